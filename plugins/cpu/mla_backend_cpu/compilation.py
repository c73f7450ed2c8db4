"""Compiling the kernels in `native/`: into a wheel by `hatch_build.py`, and at first use by `cache.py`.

They are compiled for several instruction sets, of which a processor has some.

The kernels of one level are a folder with a library, its checksum, and the compiler that built it. Its name
begins with a digest of everything the library depends on except the compiler.

This imports the standard library alone: a build has neither torch nor `mla_backends`, and imports this file
without the package around it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


# --------------------------------------------------------------------------------- instruction sets
class BuildError(Exception):
    """The kernels could not be built or may not run here; the message is one clause saying why."""


@dataclass(frozen=True)
class Level:
    """One instruction set that the kernels can be compiled for."""

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]  # processor flags, as Linux names them


_V3 = frozenset({"avx2", "fma", "f16c", "bmi2"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_BF16 = _V4 | {"avx512_bf16"}
_AMX = _BF16 | {"amx_tile", "amx_bf16"}


def _level(name: str, needs: frozenset[str]) -> Level:
    """Name every instruction set to the compiler: -march=x86-64-v4 needs GCC 11, these do not."""
    spelt = {"avx512_bf16": "avx512bf16", "amx_tile": "amx-tile", "amx_bf16": "amx-bf16"}
    return Level(name, tuple(sorted(f"-m{spelt.get(flag, flag)}" for flag in needs)), needs)


# Best first; the last one runs anywhere.
LEVELS = (
    _level("amx", _AMX),
    _level("avx512_bf16", _BF16),
    _level("avx512", _V4),
    _level("avx2", _V3),
    _level("portable", frozenset()),
)


def levels_of(machine: str) -> tuple[Level, ...]:
    """Return the levels that processors of this kind may have; `machine` as `platform.machine()` names it."""
    return LEVELS if machine == "x86_64" else tuple(level for level in LEVELS if not level.needs)


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
    if wanted == EMULATED:  # on the best other instructions of this processor
        base = next(level for level in LEVELS[1:] if missing(level) is None)
        return (Level(EMULATED, ("-DMLA_EMULATE_TILES", *base.flags), base.needs),)
    if wanted == "auto":
        return tuple(level for level in LEVELS if level.needs <= processor_flags())
    (level,) = (level for level in LEVELS if level.name == wanted)
    if reason := missing(level):
        raise BuildError(reason)
    return (level,)


# ------------------------------------------------------------------------------------- the compiler

SOURCES = Path(__file__).resolve().parent / "native"
TIMEOUT = 600  # seconds after which a compiler is assumed to hang; it needs about five
# Every level is compiled with these.
FLAGS = (
    "-O3", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno",
    "-fvisibility=hidden", "-Wno-psabi",
)  # fmt: skip
# What every processor of a kind has: arguments of CXX such as -march=native must not make a level need more.
_BASE = {"x86_64": ("-march=x86-64",), "aarch64": ("-march=armv8-a",)}
# Stripped, so that the result depends on nothing else, such as the names of folders. Linked without an OpenMP
# runtime: torch's own is already loaded.
LINK_FLAGS = ("-shared", "-s")


def find_compiler() -> tuple[str, ...]:
    """Return the command of the C++ compiler: $CXX, else g++, else c++. Raises `BuildError`."""
    try:
        chosen = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise BuildError(f"CXX is not a valid command: {error}") from error
    for candidate in [chosen] if chosen else [["g++"], ["c++"]]:
        if shutil.which(candidate[0]):
            return tuple(candidate)
    name = chosen[0] if chosen else "g++"
    raise BuildError(f"no C++ compiler '{name}' was found (install g++, or set CXX)")


def compiled_machine(command: tuple[str, ...]) -> str:
    """Return the machine it compiles for, as `platform.machine()` names it there."""
    target = _run([*command, "-dumpmachine"]).strip()
    name, _, system = target.partition("-")
    here = sysconfig.get_platform().rpartition("-")[2]
    name = {"powerpc64le": "ppc64le"}.get(name, name)
    if "linux" not in system or name not in (*_BASE, here):
        known = ", ".join(dict.fromkeys((*_BASE, here)))
        raise BuildError(f"the compiler '{command[0]}' compiles for '{target}', not for Linux on {known}")
    return name


def flags_of(level: Level, machine: str) -> tuple[str, ...]:
    """Return the arguments that a level is compiled with for a machine."""
    return (*FLAGS, *_BASE.get(machine, ()), *level.flags)


def check_flags(command: tuple[str, ...], level: Level) -> None:
    """Raise `BuildError` at once if the compiler does not know the instructions of a level."""
    if level.flags:
        _run([*command, *level.flags, "-fsyntax-only", "-x", "c++", os.devnull])


def _run(command: list[str]) -> str:
    """Run the compiler and return what it prints. Raises `BuildError` with its first error."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},  # a message is searched for the word "error"
            timeout=TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the compiler '{command[0]}' failed: {error}") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).splitlines()
        first = next((line for line in lines if "error" in line.lower()), (lines or ["no message"])[0])
        raise BuildError(f"the compiler '{command[0]}' failed: {first.strip()}")
    return done.stdout


# ---------------------------------------------------------------------------------- kernels on disk

LIBRARY = "kernels.so"
_CHECKSUM, _COMPILER = "sha256", "compiler"


@dataclass(frozen=True)
class Artifact:
    """Kernels that are as they were stored; what is loaded is the open file that was checked."""

    path: Path
    descriptor: int
    compiler: str


def kernels_name(level: Level, machine: str | None = None) -> str:
    """Return the name of the kernels that these sources make for a machine (default: this one)."""
    target = machine or platform.machine()
    flags = (*flags_of(level, target), *LINK_FLAGS)
    digest = hashlib.sha256("\0".join((target, *flags)).encode())
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".h", ".cpp"):
            digest.update(source.read_bytes())
    return f"{level.name}-{digest.hexdigest()[:16]}"


def make_kernels(command: tuple[str, ...], level: Level, folder: Path, machine: str | None = None) -> None:
    """Compile a level for a machine (default: this one) into an empty folder.

    Raises `BuildError`, and OSError if it cannot be written.
    """
    library, built = folder / LIBRARY, folder / "kernels.o"
    flags = flags_of(level, machine or platform.machine())
    _run([*command, *flags, "-c", str(SOURCES / "api.cpp"), "-o", str(built)])
    _run([*command, *LINK_FLAGS, str(built), "-o", str(library)])
    built.unlink(missing_ok=True)
    if not library.is_file():
        raise BuildError(f"the compiler '{command[0]}' wrote no file (set CXX to a C++ compiler)")
    (folder / _CHECKSUM).write_text(hashlib.sha256(library.read_bytes()).hexdigest())
    (folder / _COMPILER).write_text(_run([*command, "--version"]).partition("\n")[0])
    for file in folder.iterdir():
        file.chmod(0o644)  # whatever the umask: nobody else may change what is loaded later


def opened_kernels(folder: Path) -> Artifact | None:
    """Return the kernels in a folder; None if there are none, or if they are damaged.

    Loading a truncated library ends the process.
    """
    with contextlib.suppress(OSError, UnicodeDecodeError), open(folder / LIBRARY, "rb") as library:
        compiler = (folder / _COMPILER).read_text()
        if hashlib.sha256(library.read()).hexdigest() == (folder / _CHECKSUM).read_text():
            return Artifact(folder / LIBRARY, os.dup(library.fileno()), compiler)
    return None


# -------------------------------------------------------------------------- all levels, for a wheel

_MOST_COMPILERS = 4  # compilers at once: each takes some 0.3 GB


def make_all_kernels(command: tuple[str, ...], machine: str, folder: Path) -> dict[str, str]:
    """Fill a folder with the kernels of all levels of a machine; return reasons by level that is left out.

    Raises `BuildError` if none is left, and OSError if they cannot be written.
    """

    def make(level: Level) -> str | None:
        target = folder / kernels_name(level, machine)
        target.mkdir()
        try:
            make_kernels(command, level, target, machine)
            if b"__kmpc" in (target / LIBRARY).read_bytes():  # torch's wheels load GNU's runtime
                raise BuildError(
                    f"'{command[0]}' compiles for LLVM's OpenMP, but torch loads GNU's (set CXX to g++)"
                )
        except BuildError as error:
            shutil.rmtree(target)
            return str(error)
        return None

    levels = levels_of(machine)
    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), _MOST_COMPILERS)) as pool:
        made = pool.map(make, levels)  # each waits for a compiler
        reasons = {level.name: reason for level, reason in zip(levels, made, strict=True) if reason}
    if len(reasons) == len(levels):
        raise BuildError(reasons[levels[-1].name])
    return reasons
