"""Compile every level that the compiler knows, side by side, for a wheel."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import artifact
from .levels import BuildError, Level, levels_of

_MOST = 4  # compilers at once: each takes some 0.3 GB


def make_all(command: tuple[str, ...], machine: str, folder: Path) -> dict[str, str]:
    """Fill a folder with the kernels of all levels of a machine; return reasons by level that is left out.

    Raises `BuildError` if none is left, and OSError if they cannot be written.
    """

    def make(level: Level) -> str | None:
        target = folder / artifact.name(level, machine)
        target.mkdir()
        try:
            artifact.make(command, level, target, machine)
            _check_openmp(command, target)
        except BuildError as error:
            shutil.rmtree(target)
            return str(error)
        return None

    levels = levels_of(machine)
    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), _MOST)) as pool:  # each waits for a compiler
        made = list(pool.map(make, levels))
    reasons = {level.name: reason for level, reason in zip(levels, made, strict=True) if reason}
    if len(reasons) == len(levels):
        raise BuildError(reasons[levels[-1].name])
    return reasons


def _check_openmp(command: tuple[str, ...], made: Path) -> None:
    """Raise `BuildError` if kernels need another OpenMP runtime than that of torch's wheels, GNU's."""
    if b"__kmpc" in (made / artifact.LIBRARY).read_bytes():
        raise BuildError(f"'{command[0]}' compiles for LLVM's OpenMP, but torch loads GNU's (set CXX to g++)")
