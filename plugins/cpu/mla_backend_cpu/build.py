"""Compile the kernels in `native/` for this processor, once, and keep the result in a cache folder.

A build happens in a private folder that is renamed into place: processes may start at once, and one that is
killed leaves nothing broken. The folder's name is a digest of everything the result depends on.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "native"
#: Seconds after which a compiler counts as hanging; it needs about five.
TIMEOUT = 600
#: What every level is compiled with.
FLAGS = (
    "-O3", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno",
    "-fvisibility=hidden", "-Wno-psabi",
)  # fmt: skip


@dataclass(frozen=True)
class Level:
    """One instruction set that the kernels can be compiled for."""

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]  # processor flags, as Linux names them


_V3 = frozenset({"avx2", "fma", "f16c", "bmi2"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
#: Best first; the last one runs anywhere.
LEVELS = (
    Level("avx512_bf16", ("-march=x86-64-v4", "-mavx512bf16"), _V4 | {"avx512_bf16"}),
    Level("avx512", ("-march=x86-64-v4",), _V4),
    Level("avx2", ("-march=x86-64-v3",), _V3),
    Level("portable", (), frozenset()),
)


class BuildError(Exception):
    """The kernels could not be built; the message is one clause saying why."""


def processor_flags() -> frozenset[str]:
    """Return the instruction sets the processor has; empty where the system does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    match = re.search(r"^flags\s*:\s*(.+)$", text, re.MULTILINE)
    return frozenset(match.group(1).split()) if match else frozenset()


def choose_level(wanted: str = "auto") -> Level:
    """Return the best level this processor runs, or the one named. Raises `BuildError`."""
    flags = processor_flags()
    for level in LEVELS:
        if wanted in ("auto", level.name):
            missing = sorted(level.needs - flags)
            if not missing:
                return level
            if wanted == level.name:
                raise BuildError(f"this processor lacks {', '.join(missing)}, which level '{wanted}' needs")
    raise BuildError(f"there is no level '{wanted}'")


def library(level: Level) -> Path:
    """Return the compiled kernels, building them when they are not in the cache. Raises `BuildError`."""
    compiler = _compiler()
    digest = hashlib.sha256(
        "\0".join((_version(compiler), platform.machine(), *FLAGS, *level.flags)).encode()
    )
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".h", ".cpp"):
            digest.update(source.read_bytes())
    kept = _cache() / f"{level.name}-{digest.hexdigest()[:16]}"
    if not _intact(kept):
        try:
            _build(compiler, level, kept)
        except OSError as error:
            raise BuildError(
                f"built kernels cannot be kept: {error} (name another folder in MLA_CACHE_DIR)"
            ) from error
    return kept / "kernels.so"


def _intact(kept: Path) -> bool:
    """Say whether the kernels are as they were put there: loading a file cut short ends the process."""
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
        private.chmod(0o755)  # an image may be built by root and run by somebody else
        with contextlib.suppress(OSError):  # another process was first: its result is the same
            private.rename(kept)
    finally:
        shutil.rmtree(private, ignore_errors=True)
    if not _intact(kept):
        raise OSError(f"'{kept}' cannot be replaced")


def _note(text: str) -> None:
    with contextlib.suppress(OSError):  # whoever read along may be gone
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def _sweep(folder: Path) -> None:
    """Remove what builds that were killed have left."""
    for private in folder.glob(".building-*"):
        with contextlib.suppress(OSError):  # its owner is done just now
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
        raise BuildError(f"the compiler '{command[0]}' failed: {first.strip()}")
    return done.stdout


def _compiler() -> list[str]:
    """Return the C++ compiler: $CXX, else g++, else c++."""
    try:
        chosen = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise BuildError(f"CXX names no compiler: {error}") from error
    for candidate in [chosen] if chosen else [["g++"], ["c++"]]:
        if shutil.which(candidate[0]):
            return candidate
    name = chosen[0] if chosen else "g++"
    raise BuildError(f"no C++ compiler '{name}' was found (install g++, or name one in CXX)")


@functools.cache
def _version_of(*compiler: str) -> str:
    return _run([*compiler, "--version"])


def _version(compiler: list[str]) -> str:
    return _version_of(*compiler)


def _cache() -> Path:
    """Return the folder that keeps built kernels."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(os.environ.get("MLA_CACHE_DIR") or Path(base) / "mla") / "cpu"
