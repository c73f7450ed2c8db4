"""Which of the instruction sets that the kernels are compiled for this processor has."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform

from mla_backend_cpu.compilation import LEVELS, BuildError, Level

# The kernels of level amx with its instructions emulated in C++; for tests, and never chosen automatically.
EMULATED = "amx_emulated"

# From the Linux headers for x86-64: how a process asks to use tiles.
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


@functools.cache
def processor_flags() -> frozenset[str]:
    """Return the instruction sets that a program may use here, as Linux names them; empty where unknown."""
    if platform.machine() != "x86_64":
        return frozenset()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        return frozenset(next((line for line in file if line.startswith("flags")), "").split())
    return frozenset()


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


def levels(wanted: str = "auto") -> tuple[Level, ...]:
    """Return the level named, or for "auto" those whose instructions the processor has, best first.

    Raises `BuildError` if the level that was named cannot run here.
    """
    if wanted == EMULATED:
        return (_emulated(),)
    flags = processor_flags()
    if wanted == "auto":
        return tuple(level for level in LEVELS if level.needs <= flags)
    (level,) = (level for level in LEVELS if level.name == wanted)
    if reason := missing(level):
        raise BuildError(reason)
    return (level,)


def _emulated() -> Level:
    """Return the tile kernels on the best other instructions of this processor."""
    base = next(level for level in LEVELS[1:] if missing(level) is None)
    return Level(EMULATED, ("-DMLA_EMULATE_TILES", *base.flags), base.needs)
