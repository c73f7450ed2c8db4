"""The kernels of one level on disk: a folder with a library, its checksum, and the compiler that built it.

The folder's name begins with a digest of everything the library depends on except the compiler.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from . import compiler
from .levels import Level

LIBRARY = "kernels.so"
_CHECKSUM, _COMPILER = "sha256", "compiler"


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
    try:
        library = folder / LIBRARY
        descriptor = os.open(library, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    with contextlib.suppress(OSError, UnicodeDecodeError):
        with open(descriptor, "rb", closefd=False) as file:
            found = hashlib.sha256(file.read()).hexdigest()
        if found == (folder / _CHECKSUM).read_text():
            return Artifact(library, descriptor, (folder / _COMPILER).read_text())
    os.close(descriptor)
    return None
