"""Run one command with a time limit, in a session of its own, and end it with everything it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

GRACE = 20.0  # seconds between SIGTERM, upon which the runner writes its result, and SIGKILL
LAST = 5.0  # seconds that a process may take to go after SIGKILL
TIMED_OUT = 124  # as timeout(1)


@dataclass(frozen=True)
class Ended:
    """How a command ended. A negative code is the number of the signal that ended it."""

    code: int
    seconds: float
    out: Path
    err: Path

    @property
    def last_error(self) -> str:
        """The last line on stderr that says something."""
        return _last_line(self.err)

    @property
    def last_output(self) -> str:
        """The last line on stdout that says something."""
        return _last_line(self.out)


def run(
    words: Sequence[str], seconds: float, out: Path, err: Path, env: Mapping[str, str] | None = None
) -> Ended:
    """Run a command; its streams go to two files. On KeyboardInterrupt it is ended before that goes on."""
    began = time.monotonic()
    with out.open("wb") as stdout, err.open("wb") as stderr:
        child = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=env, start_new_session=True
        )
    try:
        code = child.wait(seconds)
    except subprocess.TimeoutExpired:
        code = TIMED_OUT
        _end(child)
    except KeyboardInterrupt:
        _end(child)
        raise
    finally:
        _signal(child, signal.SIGKILL)  # what it left running
    return Ended(code, time.monotonic() - began, out, err)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ask a command to end, and insist after a while or a second Ctrl-C.

    SIGTERM, because a shell lets the commands it starts in the background ignore SIGINT.
    """
    _signal(child, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        child.wait(GRACE)
    _signal(child, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it for good: the rest goes on
        child.wait(LAST)


def _signal(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""
