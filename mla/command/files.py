"""Files that are written whole or not at all, over nothing but what a command of ours wrote; and pipes."""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mla.command import console
from mla.errors import ResultError
from mla_backends import outside

TRACE_START = b'{"madeBy":"python -m mla.bench --profile"'

_STDOUT = ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")

_pipes: dict[Path, int] = {}  # opened before a run, so that their readers see one end


class Kind(NamedTuple):
    """What a command writes: a file of its kind may be replaced, anything else is the user's own."""

    name: str  # "a result file"
    fits: Callable[[bytes], bool]  # given the file, or its first `outside.MOST` bytes


def _is_result(data: bytes) -> bool:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"schema_version", "argv", "created"} <= found.keys()


def _is_trace(data: bytes) -> bool:
    zipped = data.startswith(b"\x1f\x8b")
    try:
        start = zlib.decompressobj(31).decompress(data, len(TRACE_START)) if zipped else data
    except zlib.error:
        return False
    return start.startswith(TRACE_START)


RESULT = Kind("a result file", _is_result)
TRACE = Kind("a trace of --profile", _is_trace)


def check_writable(path: Path, kind: Kind | None = None) -> None:
    """Raise `ResultError` before a long run rather than after it.

    Pipes with a reader, /dev/stdout and /dev/null are written to; what a link leads to is replaced. A file
    that is there must be empty, or of this `kind`.
    """
    try:
        if objection := _objection(path, kind):
            raise ResultError(f"cannot write '{path}': {objection}.")
    except OSError as error:
        raise ResultError(f"cannot write '{path}': {error.strerror}.") from error


def is_stream(path: Path) -> bool:
    """Return whether what is written adds up, as in a pipe or on stdout: write to it once."""
    try:
        return str(path) in _STDOUT or stat.S_ISFIFO(path.stat().st_mode) or _is_nowhere(path)
    except OSError:
        return False


def write_bytes(data: bytes, path: Path) -> None:
    """Write a file whole or not at all, or all of it to a pipe. Raises `ResultError`."""
    try:
        if is_stream(path):
            _send(data, path)
        else:
            _replace(data, _target(path))
    except OSError as error:
        raise ResultError(f"cannot write '{path}': {error.strerror}.") from error


def _objection(path: Path, kind: Kind | None) -> str:
    """Return why a path must not be written to; "" if it may."""
    if is_stream(path):
        return _unread(path)
    target = _target(path)
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        status = None
    if status is None:
        if not target.parent.is_dir():
            return f"there is no folder '{target.parent}'"
    elif stat.S_ISDIR(status.st_mode):
        return "it is a folder"
    elif not stat.S_ISREG(status.st_mode):
        return "it is neither a file nor a pipe"
    elif not status.st_mode & 0o222 or not os.access(target, os.W_OK):
        return "it is write-protected"
    elif status.st_size and not (kind and kind.fits(outside.start(target, outside.MOST)[0])):
        what = kind.name if kind else "empty"
        return f"it exists and is not {what}; remove it or name another file"
    handle, name = tempfile.mkstemp(dir=target.parent)
    os.close(handle)
    os.unlink(name)
    return ""


def _target(path: Path) -> Path:
    """Return the file that a link leads to, there or not."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _is_nowhere(path: Path) -> bool:
    return os.path.realpath(path) == os.devnull


def _unread(path: Path) -> str:
    """Open a pipe until it is written to; return why that cannot be."""
    if str(path) in _STDOUT or _is_nowhere(path) or path in _pipes:
        return ""
    try:
        _pipes[path] = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return "it is a pipe that no process reads from"
    os.set_blocking(_pipes[path], True)
    return ""


def _send(data: bytes, path: Path) -> None:
    """Write to a pipe or to stdout."""
    if str(path) in _STDOUT:
        stream = console.results_stream()
        stream.flush()
        target = os.dup(stream.fileno())
    else:
        target = _pipes.pop(path) if path in _pipes else os.open(path, os.O_WRONLY)
    with open(target, "wb") as pipe:
        pipe.write(data)


def _replace(data: bytes, path: Path) -> None:
    """Put a new file in the place of an old one, whose mode it takes over."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.chmod(file.name, stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
