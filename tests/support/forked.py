"""`python -m ...` at the price of a fork: torch is imported once, and no call sees another's state."""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
import runpy
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from outcome import Outcome


def import_all(package: str, *but: str) -> None:
    """Import all of a package, so that no call has to: not what starts it, and nothing below `but`."""
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        if not module.name.endswith("__main__") and not module.name.startswith(but):
            with contextlib.suppress(ImportError):  # of a library that is not installed
                importlib.import_module(module.name)


def call(words: Sequence[str], folder: Path, before: Callable[[], object] = lambda: None) -> Outcome:
    """Run `python -m WORDS` in `folder`; `before` is called in the process, too. Standard input is empty."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = os.fork()
        if not process:
            _become(words, folder, before, out.fileno(), err.fileno())
        _, status = os.waitpid(process, 0)
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode("utf-8", "replace"))
    return Outcome(os.waitstatus_to_exitcode(status), *texts)


def _become(words: Sequence[str], folder: Path, before: Callable[[], object], out: int, err: int) -> None:
    code = 70
    try:
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.chdir(folder)
        os.environ["MLA_SUPERVISE"] = "0"  # which would start what was forked once more, not these words
        before()
        sys.argv = list(words)
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001  # what a process does with it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
