"""Run the C++ compiler: find it, ask it for its version and target, and compile one level."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from .levels import BuildError, Level

SOURCES = Path(__file__).resolve().parents[1] / "native"
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
# How compilers and assemblers report an unknown instruction set.
_UNKNOWN = ("unrecognized command", "unknown argument", "no such instruction")


class NoCompiler(BuildError):
    """There is no compiler, or CXX does not name one."""


class FlagError(BuildError):
    """The compiler, or its assembler, does not know the instructions of a level."""


def find() -> tuple[str, ...]:
    """Return the command of the C++ compiler: $CXX, else g++, else c++. Raises `NoCompiler`."""
    try:
        chosen = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise NoCompiler(f"CXX is not a valid command: {error}") from error
    for candidate in [chosen] if chosen else [["g++"], ["c++"]]:
        if shutil.which(candidate[0]):
            return tuple(candidate)
    name = chosen[0] if chosen else "g++"
    raise NoCompiler(f"no C++ compiler '{name}' was found (install g++, or set CXX)")


@functools.cache
def version(command: tuple[str, ...]) -> str:
    """Return what the compiler says about itself, of which the first line names it. Raises `BuildError`."""
    return _run([*command, "--version"])


def machine(command: tuple[str, ...]) -> str:
    """Return the machine it compiles for, as `platform.machine()` names it there."""
    target = _run([*command, "-dumpmachine"]).strip()
    name, _, system = target.partition("-")
    here = sysconfig.get_platform().rpartition("-")[2]
    name = {"powerpc64le": "ppc64le"}.get(name, name)
    if "linux" not in system or name not in (*_BASE, here):
        known = ", ".join(dict.fromkeys((*_BASE, here)))
        raise BuildError(f"the compiler '{command[0]}' compiles for '{target}', not for Linux on {known}")
    return name


def flags(level: Level, machine: str) -> tuple[str, ...]:
    """Return the arguments that a level is compiled with for a machine."""
    return (*FLAGS, *_BASE.get(machine, ()), *level.flags)


def check(command: tuple[str, ...], level: Level) -> None:
    """Raise `FlagError` at once if the compiler does not know the instructions of a level."""
    if level.flags:
        _run([*command, *level.flags, "-fsyntax-only", "-x", "c++", os.devnull])


def compile_level(command: tuple[str, ...], level: Level, machine: str, library: Path) -> None:
    """Compile and link the kernels of one level for a machine into a shared library. Raises `BuildError`."""
    built = library.with_suffix(".o")
    _run([*command, *flags(level, machine), "-c", str(SOURCES / "api.cpp"), "-o", str(built)])
    _run([*command, *LINK_FLAGS, str(built), "-o", str(library)])
    built.unlink(missing_ok=True)
    if not library.is_file():
        raise BuildError(f"the compiler '{command[0]}' wrote no file (set CXX to a C++ compiler)")


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
        unknown = any(text in first for text in _UNKNOWN)
        kind = FlagError if unknown else BuildError
        raise kind(f"the compiler '{command[0]}' failed: {first.strip()}")
    return done.stdout
