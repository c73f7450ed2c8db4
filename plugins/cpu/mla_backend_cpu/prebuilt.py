"""Kernels that came with the installed wheel.

Whoever can write them can write the Python beside them, so that they are as trustworthy as that.
"""

from __future__ import annotations

from pathlib import Path

from mla_backend_cpu.compilation import artifact
from mla_backend_cpu.compilation.artifact import Artifact
from mla_backend_cpu.compilation.levels import Level

FOLDER = Path(__file__).parent / "kernels"  # made by hatch_build.py


def find(level: Level) -> Artifact | str:
    """Return the kernels of a level, or why there are none, as a clause."""
    if not FOLDER.is_dir():
        return "no kernels came with this installation"
    folder = FOLDER / artifact.name(level)
    if found := artifact.opened(folder):
        return found
    if folder.is_dir():
        return f"those that came with this installation are damaged: '{folder}'"
    if any(FOLDER.glob(f"{level.name}-*")):
        return "those that came with this installation were built from other sources"
    return "this installation came with kernels, but not with these"
