"""Which of the instruction sets that the kernels are compiled for this processor has."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

from mla_backend_cpu.compilation.levels import LEVELS, BuildError, Level

# The kernels of level amx with its instructions emulated in C++; for tests, and never chosen automatically.
EMULATED = "amx_emulated"

# From the Linux headers: how a process asks for permission to use tiles.
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


def processor_flags() -> frozenset[str]:
    """Return the instruction sets the processor has; empty if the system does not report them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    match = re.search(r"^flags\s*:\s*(.+)$", text, re.MULTILINE)
    return frozenset(match.group(1).split()) if match else frozenset()


@functools.cache
def tiles_refused() -> str | None:
    """Ask Linux, once, that this process may use AMX tiles; return why it may not, or None."""
    if platform.machine() != "x86_64":
        return f"AMX is an extension of x86-64, and this machine is {platform.machine()}"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0:
        return None
    return f"Linux refuses this process AMX tiles ({os.strerror(ctypes.get_errno())})"


def missing(level: Level) -> str | None:
    """Return why the kernels of `level` cannot run here, or None."""
    absent = sorted(level.needs - processor_flags())
    if absent:
        return f"this processor lacks {', '.join(absent)}, which level '{level.name}' needs"
    return tiles_refused() if "amx_tile" in level.needs else None


def choose_level(wanted: str = "auto") -> Level:
    """Return the best level this processor runs, or the one named. Raises `BuildError`."""
    if wanted == EMULATED:
        return _emulated()
    for level in LEVELS:
        if wanted in ("auto", level.name):
            reason = missing(level)
            if reason is None:
                return level
            if wanted == level.name:
                raise BuildError(reason)
    raise BuildError(f"unknown level '{wanted}'")


def candidates(wanted: str) -> Iterator[Level]:
    """Yield the levels to try, best first: for "auto" those whose instructions the processor has.

    Raises `BuildError` if the level that was named cannot run here.
    """
    if wanted != "auto":
        yield choose_level(wanted)
        return
    flags = processor_flags()
    yield from (level for level in LEVELS if level.needs <= flags)


def _emulated() -> Level:
    """Return the tile kernels on the best other instructions of this processor."""
    base = next(level for level in LEVELS[1:] if missing(level) is None)
    return Level(EMULATED, ("-DMLA_EMULATE_TILES", *base.flags), base.needs)
