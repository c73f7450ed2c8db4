"""Compile every level that the compiler knows, side by side, for a wheel."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import artifact, compiler
from .levels import Level, levels_of


def make_all(command: tuple[str, ...], machine: str, folder: Path) -> dict[str, str]:
    """Fill a folder with the kernels of all levels of a machine; return reasons by level that is left out.

    Raises `BuildError` if one fails for another reason than that the compiler does not know its instructions.
    """

    def make(level: Level) -> str | None:
        target = folder / artifact.name(level, machine)
        target.mkdir()
        try:
            artifact.make(command, level, target)
        except compiler.FlagError as error:
            shutil.rmtree(target)
            return str(error)
        return None

    levels = levels_of(machine)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # each waits for a compiler of its own
        reasons = pool.map(make, levels)
        return {level.name: reason for level, reason in zip(levels, reasons, strict=True) if reason}
