"""Open a file that somebody else may have made: regular, of bounded size, in its folder, without waiting."""

from __future__ import annotations

import errno
import os
import select
import stat
from pathlib import Path, PurePosixPath
from typing import BinaryIO

# Bytes; no config, workload, index or result comes close to this.
MOST = 64 << 20

_PATIENCE = 2  # seconds that a writer has to open its pipe


def read(path: str | Path, folder: Path | None = None) -> bytes:
    """Return what a file holds, `MOST` bytes at most. Raises OSError, whose `strerror` says why not.

    What a user names may be a pipe that has a writer, or /dev/null. In a `folder`, `path` is the name of a
    regular file that lies `inside`.
    """
    place = path if folder is None else inside(folder, str(path))
    with open(place, "rb", opener=_at_once) as file:
        mode = os.fstat(file.fileno()).st_mode
        if folder is None and stat.S_ISFIFO(mode):
            data = _of_pipe(file, path)
        elif stat.S_ISREG(mode) or (folder is None and os.path.realpath(path) == os.devnull):
            data = file.read(MOST + 1)
        else:
            raise _refusal("it is not a regular file", path)
    if len(data) > MOST:
        raise _refusal(f"it is larger than {MOST >> 20} MiB", path, errno.EFBIG)
    return data


def start(path: str | Path, length: int) -> tuple[bytes, int]:
    """Return the first bytes of a regular file, and its size. Raises OSError."""
    with open(path, "rb", opener=_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise _refusal("it is not a regular file", path)
        return file.read(length), status.st_size


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder; links may lead within it or its hub cache. Raises OSError."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        raise _refusal("it lies outside the directory", name, errno.EPERM)
    path = folder / name
    if not Path(os.path.realpath(path)).is_relative_to(_root(Path(os.path.realpath(folder)))):
        raise _refusal("it is a link that leaves the directory", name, errno.EPERM)
    return path


def _root(folder: Path) -> Path:
    """Return the folder that links may point into: this one, or the hub cache entry it is a snapshot of."""
    for parent in folder.parents:
        if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
            return parent.parent
    return folder


def _at_once(path: str, flags: int) -> int:
    """Open without waiting for the writer of a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))


def _of_pipe(file: BinaryIO, path: str | Path) -> bytes:
    """Read a pipe to its end, or to more than `MOST` bytes, once a process has opened its other end."""
    descriptor = file.fileno()
    select.select([descriptor], [], [], _PATIENCE)
    try:
        begun = os.read(descriptor, MOST)
    except BlockingIOError:  # it has a writer, which is slow
        begun = b""
    else:
        if not begun:
            raise _refusal("it is a pipe that no process writes to", path)
    os.set_blocking(descriptor, True)
    return begun + file.read(MOST + 1 - len(begun))


def _refusal(why: str, path: str | Path, number: int = errno.EINVAL) -> OSError:
    return OSError(number, why, str(path))
