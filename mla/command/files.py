"""Files that are written whole or not at all, over nothing but what a command of ours wrote; and pipes."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from mla.command import console
from mla.errors import ResultError
from mla_backends import outside

TRACE_START = b'{"madeBy":"python -m mla.bench --profile"'

_STDOUT = ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")

# How `mla.bench.results.encode` begins; read back by hand or by `jq .` it begins like this as well.
_WORDS = rb'\[(?:\s*"(?:[^"\\]|\\.)*",?)*\s*\]'
_RESULT = re.compile(rb'\s*\{\s*"schema_version":\s*\d+,\s*"argv":\s*%b,\s*"(?:alone|created)":' % _WORDS)
_START = 1 << 20  # bytes that tell what a file is

_pipes: dict[Path, int] = {}  # opened before a run, so that their readers see one end

written: list[Path] = []  # by this process


class Kind(NamedTuple):
    """What a command writes: a file of its kind may be replaced, anything else is the user's own."""

    name: str  # "a result file"
    fits: Callable[[bytes], bool]  # given the first MiB of the file


def _is_trace(data: bytes) -> bool:
    with contextlib.suppress(zlib.error):
        data = zlib.decompressobj(31).decompress(data, len(TRACE_START))
    return data.startswith(TRACE_START)


RESULT = Kind("a result file", lambda data: _RESULT.match(data) is not None)
TRACE = Kind("a trace of --profile", _is_trace)


def check_writable(path: Path, kind: Kind | None = None) -> None:
    """Raise `ResultError` before a long run rather than after it.

    Pipes with a reader, /dev/stdout and /dev/null are written to; what a link leads to is replaced. A file
    that is there must be empty, or of this `kind`.
    """
    with _naming(path):
        if objection := _unread(path) if is_stream(path) else _objection(path, kind):
            raise ResultError(f"cannot write '{path}': {objection}.")


@contextlib.contextmanager
def _naming(path: Path, what: str = "write") -> Iterator[None]:
    """Say of which file or folder the system complains."""
    try:
        yield
    except OSError as error:
        raise ResultError(f"cannot {what} '{path}': {error.strerror}.") from error


def check_not_input(path: Path, inputs: Iterable[Path]) -> None:
    """Raise `ResultError` for a path that is one of the files which are read."""
    if path.exists() and any(other.exists() and other.samefile(path) for other in inputs):
        raise ResultError(f"cannot write '{path}': it is one of the result files; name another file.")


def make_folder(path: Path) -> None:
    """Make a folder, unless it is there. Raises `ResultError`."""
    with _naming(path, "make the folder"):
        path.mkdir(exist_ok=True)


def is_stdout(path: Path | None) -> bool:
    """Return whether stdout is for what is written, so that a table would spoil it."""
    return str(path) in _STDOUT


def is_stream(path: Path) -> bool:
    """Return whether what is written adds up, as in a pipe or on stdout: write to it once."""
    try:
        return is_stdout(path) or path.is_fifo() or os.path.realpath(path) == os.devnull
    except OSError:  # its folder cannot be read any more, which writing will say
        return False


def write_bytes(data: bytes, path: Path) -> None:
    """Write a file whole or not at all, or all of it to a pipe. Raises `ResultError`."""
    with _naming(path):
        if is_stdout(path):
            console.write(data)
        elif is_stream(path):
            with open(_pipes.pop(path, path), "wb") as pipe:
                pipe.write(data)
        else:
            _replace(data, _target(path))
    written.append(path)


def _objection(path: Path, kind: Kind | None) -> str:
    """Return why a file must not be written; "" if it may."""
    target = _target(path)
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if not target.parent.is_dir():
            return f"there is no folder '{target.parent}'"
    else:
        if stat.S_ISDIR(status.st_mode):
            return "it is a folder"
        if not stat.S_ISREG(status.st_mode):
            return "it is neither a file nor a pipe"
        if not status.st_mode & 0o222 or not os.access(target, os.W_OK):
            return "it is write-protected"
        if status.st_size and not (kind and kind.fits(outside.start(target, _START)[0])):
            what = kind.name if kind else "empty"
            return f"it exists and is not {what}; remove it or name another file"
    with tempfile.TemporaryFile(dir=target.parent):  # raises if no file can be made there
        return ""


def _target(path: Path) -> Path:
    """Return the file that a link leads to, there or not."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _unread(path: Path) -> str:
    """Open a pipe until it is written to; return why that cannot be."""
    known = {
        errno.EBADF: "it is closed, or open for reading",
        errno.ENXIO: "it is a pipe that no process reads from",
    }
    try:
        if is_stdout(path):
            if (number := console.descriptor(console.results_stream())) is not None:
                os.write(number, b"")
        elif path not in _pipes and path.is_fifo():
            _pipes[path] = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
            os.set_blocking(_pipes[path], True)
    except OSError as error:
        if error.errno not in known:
            raise
        return known[error.errno]
    return ""


def _replace(data: bytes, path: Path) -> None:
    """Put a new file in the place of an old one, whose mode it takes over.

    Its content changes in place where the folder does not let it go: a mount point, or in a sticky folder.
    """
    handle, name = tempfile.mkstemp(dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(data)
        os.chmod(name, stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o644)
        os.replace(name, path)
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.EPERM, errno.EACCES):
            raise
        with open(os.open(path, os.O_WRONLY | os.O_TRUNC), "wb") as file:
            file.write(data)
    finally:
        with contextlib.suppress(FileNotFoundError):  # it has taken its place
            os.unlink(name)
