"""How one call of a command ended, in this process or in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """Exit code and streams."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The last line on stderr, which says what went wrong."""
        return self.err.splitlines()[-1] if self.err else ""


def run_python(
    *words: str, cwd: Path, folders: Iterable[Path] = (), timeout: float = 900, **environment: str
) -> Outcome:
    """Run this Python in one thread, with folders that it imports from, and no device hidden."""
    path = [*map(str, folders), os.environ.get("PYTHONPATH", "")]
    shown = {name: value for name, value in os.environ.items() if not name.endswith("_VISIBLE_DEVICES")}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={
            **shown,
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,  # minutes on a slow machine
    )
    return Outcome(done.returncode, done.stdout, done.stderr)
