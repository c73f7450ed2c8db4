"""Compile the kernels in `native/` for this processor, once, and keep the result in a cache folder.

A build happens in a private folder that is renamed into place: processes may start at once, and one that is
killed leaves nothing broken. The folder's name holds digests of everything the result depends on.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mla_backend_cpu.instruction_sets import BuildError, Level

SOURCES = Path(__file__).parent / "native"
TIMEOUT = 600  # seconds after which a compiler is assumed to hang; it needs about five
# Every level is compiled with these.
FLAGS = (
    "-O3", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno",
    "-fvisibility=hidden", "-Wno-psabi",
)  # fmt: skip
# How compilers and assemblers report an unknown instruction set.
_UNKNOWN = ("unrecognized command", "unknown argument", "no such instruction")


class FlagError(BuildError):
    """The compiler, or its assembler, does not know the instructions of a level."""


def library(level: Level) -> Path:
    """Return the compiled kernels, building them when they are not in the cache. Raises `BuildError`.

    A folder's name identifies what was compiled, and by which compiler. If no compiler is found, the newest
    kernels that any compiler has built from the same are used.
    """
    name = f"{level.name}-{_digest(level)}"
    try:
        compiler = _compiler()
    except BuildError:
        made = _newest(name)
        if made is None:
            raise
        return made / "kernels.so"
    version = hashlib.sha256(_version(compiler).encode()).hexdigest()
    kept = _cache() / f"{name}-{version[:8]}"
    if not _intact(kept):
        try:
            _build(compiler, level, kept)
        except OSError as error:
            raise BuildError(
                f"built kernels cannot be stored: {error} (set MLA_CACHE_DIR to another folder)"
            ) from error
    return kept / "kernels.so"


def _digest(level: Level) -> str:
    """Return a digest of everything the result depends on, except the compiler."""
    digest = hashlib.sha256("\0".join((platform.machine(), *FLAGS, *level.flags)).encode())
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".h", ".cpp"):
            digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _newest(name: str) -> Path | None:
    """Return the newest intact build of that name by any compiler."""
    made = [folder for folder in _cache().glob(f"{name}-*") if _intact(folder)]
    return max(made, key=lambda folder: folder.stat().st_mtime, default=None)


def _intact(kept: Path) -> bool:
    """Return whether the kernels are as they were stored: loading a truncated file ends the process."""
    try:
        return _checksum(kept) == (kept / "sha256").read_bytes()
    except OSError:
        return False


def _checksum(folder: Path) -> bytes:
    return hashlib.sha256((folder / "kernels.so").read_bytes()).hexdigest().encode()


def _build(compiler: list[str], level: Level, kept: Path) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    _sweep(kept.parent)
    private = Path(tempfile.mkdtemp(prefix=".building-", dir=kept.parent))
    _note(f"building the CPU kernels for {level.name}, once, with {compiler[0]} ...")
    try:
        _compile(compiler, level, private)
        if not _intact(kept):
            shutil.rmtree(kept, ignore_errors=True)
        private.chmod(0o755)  # an image may be built by root and run by another user
        with contextlib.suppress(OSError):  # another process was first: its result is the same
            private.rename(kept)
    finally:
        shutil.rmtree(private, ignore_errors=True)
    if not _intact(kept):
        raise OSError(f"'{kept}' cannot be replaced")


def _note(text: str) -> None:
    with contextlib.suppress(OSError):  # stderr may be closed
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def _sweep(folder: Path) -> None:
    """Remove what killed builds have left."""
    for private in folder.glob(".building-*"):
        with contextlib.suppress(OSError):  # its owner has just finished
            if time.time() - private.stat().st_mtime > 3 * TIMEOUT:
                shutil.rmtree(private, ignore_errors=True)


def _compile(compiler: list[str], level: Level, folder: Path) -> None:
    """Compile and link into `folder`. Linked without an OpenMP runtime: torch's own is already loaded."""
    built, linked = folder / "kernels.o", folder / "kernels.so"
    _run([*compiler, *FLAGS, *level.flags, "-c", str(SOURCES / "api.cpp"), "-o", str(built)])
    _run([*compiler, "-shared", str(built), "-o", str(linked)])
    built.unlink()
    (folder / "sha256").write_bytes(_checksum(folder))


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


def _compiler() -> list[str]:
    """Return the C++ compiler: $CXX, else g++, else c++."""
    try:
        chosen = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise BuildError(f"CXX is not a valid command: {error}") from error
    for candidate in [chosen] if chosen else [["g++"], ["c++"]]:
        if shutil.which(candidate[0]):
            return candidate
    name = chosen[0] if chosen else "g++"
    raise BuildError(f"no C++ compiler '{name}' was found (install g++, or set CXX)")


@functools.cache
def _version_of(*compiler: str) -> str:
    return _run([*compiler, "--version"])


def _version(compiler: list[str]) -> str:
    return _version_of(*compiler)


def _cache() -> Path:
    """Return the folder of the built kernels."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(os.environ.get("MLA_CACHE_DIR") or Path(base) / "mla") / "cpu"
