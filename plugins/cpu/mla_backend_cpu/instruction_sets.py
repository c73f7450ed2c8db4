"""Which of the instruction sets that the kernels are compiled for this processor has."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
from collections.abc import Iterator

from mla_backend_cpu.compilation import LEVELS, BuildError, Level

# The kernels of level amx with its instructions emulated in C++; for tests, and never chosen automatically.
EMULATED = "amx_emulated"

# Name -> the leaf of CPUID by its number in glibc, the register of EAX, EBX, ECX and EDX, and the bit.
_FLAGS = {
    "fma": (0, 2, 12),
    "f16c": (0, 2, 29),
    "avx2": (1, 1, 5),
    "bmi2": (1, 1, 8),
    "avx512f": (1, 1, 16),
    "avx512dq": (1, 1, 17),
    "avx512cd": (1, 1, 28),
    "avx512bw": (1, 1, 30),
    "avx512vl": (1, 1, 31),
    "avx512_bf16": (6, 0, 5),
    "amx_bf16": (1, 3, 22),
    "amx_tile": (1, 3, 24),
}
# What glibc has since 2.33 (sys/platform/x86.h): of a leaf, four registers as the processor gives them, and
# the same without what the system does not save the registers of.
_CPU_FEATURES = "__x86_get_cpuid_feature_leaf"

# From the Linux headers for x86-64: how a process asks to use tiles.
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


@functools.cache
def processor_flags() -> frozenset[str]:
    """Return the instruction sets that a program may use here, as Linux names them; empty where unknown.

    As the C library has asked the processor: /proc/cpuinfo is the host's in an emulator. It is read where
    that library is older, or another one.
    """
    if platform.machine() != "x86_64":
        return frozenset()
    try:
        leaf = getattr(ctypes.CDLL(None), _CPU_FEATURES)
    except (OSError, AttributeError):
        return _reported()
    leaf.argtypes, leaf.restype = [ctypes.c_uint], ctypes.POINTER(ctypes.c_uint32 * 8)
    return frozenset(
        name
        for name, (number, register, bit) in _FLAGS.items()
        if leaf(number).contents[4 + register] >> bit & 1
    )


def _reported() -> frozenset[str]:
    """Return what /proc/cpuinfo names."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        words = next((line.split() for line in file if line.startswith("flags")), [])
        return frozenset(words) & _FLAGS.keys()
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
