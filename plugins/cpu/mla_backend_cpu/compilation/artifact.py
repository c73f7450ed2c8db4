"""The kernels of one level on disk: a folder with a library, its checksum, and the compiler that built it.

The folder's name begins with a digest of everything the library depends on except the compiler.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import stat
from dataclasses import dataclass
from pathlib import Path

from . import compiler
from .levels import Level

LIBRARY = "kernels.so"
_CHECKSUM, _COMPILER = "sha256", "compiler"
_MOST = 256 << 20  # bytes of a file; kernels take less than one MiB


@dataclass(frozen=True)
class Artifact:
    """Kernels that are as they were stored; what is loaded is the open file that was checked."""

    path: Path
    descriptor: int
    compiler: str


def name(level: Level, machine: str | None = None) -> str:
    """Return the name of the kernels that these sources make for a machine (default: this one)."""
    target = machine or platform.machine()
    flags = (*compiler.flags(level, target), *compiler.LINK_FLAGS)
    digest = hashlib.sha256("\0".join((target, *flags)).encode())
    for source in sorted(compiler.SOURCES.iterdir()):
        if source.suffix in (".h", ".cpp"):
            digest.update(source.read_bytes())
    return f"{level.name}-{digest.hexdigest()[:16]}"


def make(command: tuple[str, ...], level: Level, folder: Path, machine: str | None = None) -> None:
    """Compile a level for a machine (default: this one) into an empty folder.

    Raises `BuildError`, and OSError if it cannot be written.
    """
    library = folder / LIBRARY
    compiler.compile_level(command, level, machine or platform.machine(), library)
    (folder / _CHECKSUM).write_text(hashlib.sha256(library.read_bytes()).hexdigest())
    (folder / _COMPILER).write_text(compiler.version(command).partition("\n")[0])
    for file in folder.iterdir():
        file.chmod(0o644)  # whatever the umask: nobody else may change what is loaded later


def opened(folder: Path) -> Artifact | None:
    """Return the kernels in a folder; None if there are none, or if they are damaged.

    Loading a truncated library ends the process.
    """
    with contextlib.suppress(OSError, UnicodeDecodeError), contextlib.ExitStack() as undo:
        descriptor = _open(folder / LIBRARY)
        undo.callback(os.close, descriptor)
        with open(descriptor, "rb", closefd=False) as file:
            found = hashlib.sha256(file.read()).hexdigest()
        if found == _text(folder / _CHECKSUM):
            kept = Artifact(folder / LIBRARY, descriptor, _text(folder / _COMPILER))
            undo.pop_all()  # it stays open
            return kept
    return None


def _open(path: Path) -> int:
    """Open a regular file of bounded size, without waiting for the writer of a pipe. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and found.st_size <= _MOST:
        return descriptor
    os.close(descriptor)
    raise OSError(f"'{path}' is not a regular file of at most {_MOST >> 20} MiB")


def _text(path: Path) -> str:
    with open(_open(path), encoding="utf-8") as file:
        return file.read()
