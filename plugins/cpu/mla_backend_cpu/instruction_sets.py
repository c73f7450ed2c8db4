"""Which of the instruction sets that the kernels are compiled for this processor has."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import platform
import sys
from collections.abc import Callable, Iterator

from mla_backend_cpu.compilation import LEVELS, BuildError, Level

# The kernels of level amx with its instructions emulated in C++; for tests, and never chosen automatically.
EMULATED = "amx_emulated"

# push rbx; mov r8, rdx; mov eax, edi; mov ecx, esi; cpuid; mov [r8], eax; mov [r8 + 4], ebx;
# mov [r8 + 8], ecx; mov [r8 + 12], edx; pop rbx; ret
_CPUID = bytes.fromhex("53 4989d0 89f8 89f1 0fa2 418900 41895804 41894808 4189500c 5b c3")
_XGETBV = bytes.fromhex(
    "31c9 0f01d0 48c1e220 4809d0 c3"
)  # xor ecx, ecx; xgetbv; shl rdx, 32; or rax, rdx; ret
_EAX, _EBX, _ECX, _EDX = range(4)
_NOTHING = (0, 0, 0, 0)
# States that the system saves for a process: of 256 bits, of 512 bits as well, and of tiles.
_YMM, _ZMM, _TILES = 0b110, 0b1110_0110, 0b11 << 17
# Name -> leaf, register and bit of CPUID, and the states that it needs.
_FLAGS = {
    "fma": ((1, 0), _ECX, 12, _YMM),
    "f16c": ((1, 0), _ECX, 29, _YMM),
    "avx2": ((7, 0), _EBX, 5, _YMM),
    "bmi2": ((7, 0), _EBX, 8, 0),
    "avx512f": ((7, 0), _EBX, 16, _ZMM),
    "avx512dq": ((7, 0), _EBX, 17, _ZMM),
    "avx512cd": ((7, 0), _EBX, 28, _ZMM),
    "avx512bw": ((7, 0), _EBX, 30, _ZMM),
    "avx512vl": ((7, 0), _EBX, 31, _ZMM),
    "avx512_bf16": ((7, 1), _EAX, 5, _ZMM),
    "amx_bf16": ((7, 0), _EDX, 22, _TILES),
    "amx_tile": ((7, 0), _EDX, 24, _TILES),
}

# From the Linux headers for x86-64: how a process makes a file in memory, and asks to use tiles.
_MEMFD_CREATE, _CLOSE_ON_EXEC = 319, 1
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


def processor_flags() -> frozenset[str]:
    """Return the instruction sets that a program may use here, as Linux names them; empty where unknown.

    By CPUID and XGETBV: /proc/cpuinfo is the host's in an emulator, and says nothing of a hypervisor's mask.
    It is believed only where the processor cannot be asked.
    """
    asked = _ask_processor()
    if isinstance(asked, str):
        return _reported()
    leaves, states = asked
    return frozenset(
        name
        for name, (leaf, register, bit, needed) in _FLAGS.items()
        if leaves[leaf][register] >> bit & 1 and states & needed == needed
    )


@functools.cache
def _reported() -> frozenset[str]:
    """Return what /proc/cpuinfo names; empty if it cannot be read."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        return (
            frozenset(next((line for line in file if line.startswith("flags")), "").split()) & _FLAGS.keys()
        )
    return frozenset()


def unasked() -> str:
    """Return why this processor was not asked for its instructions; "" if it was."""
    asked = _ask_processor()
    return asked if isinstance(asked, str) else ""


def _unknown() -> str:
    """Return why the instructions of this processor are unknown; "" if they are known."""
    return "" if processor_flags() else unasked()


@functools.cache
def _ask_processor() -> tuple[dict[tuple[int, int], tuple[int, ...]], int] | str:
    """Return (leaf, subleaf) -> registers, and which states the system saves; or why that is unknown."""
    if platform.machine() != "x86_64" or sys.maxsize < 2**32:
        return dict.fromkeys(((1, 0), (7, 0), (7, 1)), _NOTHING), 0  # it has none of them
    try:
        cpuid, xgetbv = _functions()
    except (OSError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or error
        return f"this process cannot ask the processor for its instructions ({reason})"

    def registers(leaf: int, subleaf: int) -> tuple[int, ...]:
        answer = (ctypes.c_uint32 * 4)()
        cpuid(leaf, subleaf, answer)
        return tuple(answer)

    most = registers(0, 0)[_EAX]
    leaves = {(1, 0): registers(1, 0), (7, 0): registers(7, 0) if most >= 7 else _NOTHING}
    leaves[7, 1] = registers(7, 1) if leaves[7, 0][_EAX] >= 1 else _NOTHING
    saves = leaves[1, 0][_ECX] >> 27 & 1  # OSXSAVE: the system lets programs ask
    return leaves, xgetbv() if saves else 0


def _functions() -> tuple[Callable[..., None], Callable[[], int]]:
    """Return CPUID(leaf, subleaf, uint32[4]) and XGETBV(0) -> states. Raises OSError or AttributeError.

    Their code is never writable where it is executable, which hardened systems forbid.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    try:
        place = _mapped(libc, _memory_file(libc))
    except OSError:
        place = _mapped(libc, _temporary_file())
    cpuid = ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)
    return cpuid(place), ctypes.CFUNCTYPE(ctypes.c_uint64)(place + len(_CPUID))


def _memory_file(libc: ctypes.CDLL) -> int:
    """Return a file in memory. Python has no `os.memfd_create` where it was built for a glibc before 2.27."""
    descriptor = int(libc.syscall(_MEMFD_CREATE, b"cpuid", _CLOSE_ON_EXEC))
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return descriptor


def _temporary_file() -> int:
    """Return a file without a name on a disk, where the system has no other."""
    import tempfile

    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _mapped(libc: ctypes.CDLL, descriptor: int) -> int:
    """Write the functions to a new file, close it, and return where they can be called."""
    try:
        os.write(descriptor, _CPUID + _XGETBV)
        access = mmap.PROT_READ | mmap.PROT_EXEC
        place = libc.mmap(None, mmap.PAGESIZE, access, mmap.MAP_PRIVATE, descriptor, 0)
    finally:
        os.close(descriptor)
    if place == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(place)


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
        return _unknown() or f"this processor lacks {', '.join(absent)}, which level '{level.name}' needs"
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
    if _unknown():
        yield LEVELS[-2]  # so that it is said why it is not used
    flags = processor_flags()
    yield from (level for level in LEVELS if level.needs <= flags)


def _emulated() -> Level:
    """Return the tile kernels on the best other instructions of this processor."""
    base = next(level for level in LEVELS[1:] if missing(level) is None)
    return Level(EMULATED, ("-DMLA_EMULATE_TILES", *base.flags), base.needs)
