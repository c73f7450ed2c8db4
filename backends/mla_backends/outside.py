"""What comes from outside: files that somebody else may have made, and words read from them.

A file is regular, of bounded size, in its folder, and opened without waiting. Words are made fit for a
terminal and for a sentence.
"""

from __future__ import annotations

import errno
import os
import re
import selectors
import stat
from pathlib import Path, PurePosixPath

# Bytes; no config, workload or index comes close to this.
MAX_FILE_BYTES = 64 << 20

_PIPE_SECONDS = 2  # seconds that a writer has to open its pipe


def read(path: str | Path, folder: Path | None = None, most: int | None = None) -> bytes:
    """Return at most `most` or `MAX_FILE_BYTES` bytes of a file. Raises OSError; its `strerror` says why.

    What a user names may be a pipe that has a writer, or /dev/null. In a `folder`, `path` is the name of a
    regular file that lies `inside`.
    """
    most = MAX_FILE_BYTES if most is None else most
    place = path if folder is None else inside(folder, str(path))
    with open(place, "rb", opener=_at_once) as file:
        status, data = os.fstat(file.fileno()), bytearray()
        if folder is None and stat.S_ISFIFO(status.st_mode):
            data += _begun(file.fileno(), path)
        elif not stat.S_ISREG(status.st_mode) and (folder or os.path.realpath(path) != os.devnull):
            raise _refusal("it is not a regular file", path)
        while max(status.st_size, len(data)) <= most and (part := file.read(1 << 20)):
            data += part
    if max(status.st_size, len(data)) > most:
        raise _refusal(f"it is larger than {most >> 20} MiB", path, errno.EFBIG)
    return bytes(data)


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
    target = Path(os.path.realpath(path))
    if not any(map(target.is_relative_to, _roots(Path(os.path.realpath(folder))))):
        raise _refusal("it is a link that leaves the directory", name, errno.EPERM)
    return path


def _roots(folder: Path) -> tuple[Path, ...]:
    """Return the folders that links may point into: this one, or the hub cache entry it is a snapshot of.

    The entry's blobs may be a link to another disk.
    """
    for parent in folder.parents:
        if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
            return parent.parent, Path(os.path.realpath(parent.parent / "blobs"))
    return (folder,)


def _at_once(path: str, flags: int) -> int:
    """Open without waiting for the writer of a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))


def wait(descriptor: int, event: int, seconds: float | None = None) -> None:
    """Wait until there is an event, as those of `selectors`, on a descriptor of any number."""
    with getattr(selectors, "PollSelector", selectors.SelectSelector)() as selector:
        selector.register(descriptor, event)
        selector.select(seconds)


def _begun(descriptor: int, path: str | Path) -> bytes:
    """Return what a pipe begins with, as far as it is there; wait for a process that opens its other end."""
    wait(descriptor, selectors.EVENT_READ, _PIPE_SECONDS)
    try:
        begun = os.read(descriptor, 1 << 20)
    except BlockingIOError:  # it has a writer, which is slow
        begun = b""
    else:
        if not begun:
            raise _refusal("it is a pipe that no process writes to", path)
    os.set_blocking(descriptor, True)
    return begun


def _refusal(why: str, path: str | Path, number: int = errno.EINVAL) -> OSError:
    return OSError(number, why, str(path))


MOST_QUOTED = 200  # characters of a value

# What a terminal may be sent besides printable text: line ends, tabs, and our own colours.
_LAYOUT = re.compile(r"\r?\n|\t|\x1b\[[0-9;]*m")


def escaped(text: str) -> str:
    r"""Return text with unprintable characters escaped: controls, line ends, bidi marks ("\x1b")."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def safe(text: str) -> str:
    """Return text that acts on no terminal: `escaped`, but for line ends, tabs and colours."""
    if text.isprintable():
        return text
    kept = [*_LAYOUT.findall(text), ""]
    return "".join(escaped(part) + mark for part, mark in zip(_LAYOUT.split(text), kept, strict=True))


def shortened(text: str, most: int = MOST_QUOTED) -> str:
    """Return text of at most `most` characters: its middle is left out where it is longer."""
    half = (most - 5) // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


def quoted(value: object) -> str:
    """Return the `repr` of a value from a file, `escaped` and `shortened`."""
    try:
        return shortened(escaped(repr(value)))
    except (ValueError, RecursionError):  # an integer of thousands of digits; lists in lists without end
        return f"a {type(value).__name__} that is too large to print"
