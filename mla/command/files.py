"""Files that are written whole or not at all, over nothing but what a command of ours wrote; and pipes."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterable
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
_checked: dict[Path, Kind | None] = {}  # before a run, and not written since

written: list[Path] = []  # by this process


class Kind(NamedTuple):
    """What a command writes: a file of its kind may be replaced, anything else is the user's own."""

    name: str  # "a result file"
    fits: Callable[[bytes], bool]  # given the first MiB of the file


def _is_trace(data: bytes) -> bool:
    zipped = data.startswith(b"\x1f\x8b")
    try:
        start = zlib.decompressobj(31).decompress(data, len(TRACE_START)) if zipped else data
    except zlib.error:
        return False
    return start.startswith(TRACE_START)


RESULT = Kind("a result file", lambda data: _RESULT.match(data) is not None)
TRACE = Kind("a trace of --profile", _is_trace)


def check_writable(path: Path, kind: Kind | None = None) -> None:
    """Raise `ResultError` before a long run rather than after it.

    Pipes with a reader, /dev/stdout and /dev/null are written to; what a link leads to is replaced. A file
    that is there must be empty, or of this `kind`; `write_bytes` looks again.
    """
    try:
        if objection := _objection(path, kind):
            raise ResultError(f"cannot write '{path}': {objection}.")
    except OSError as error:
        raise ResultError(f"cannot write '{path}': {error.strerror}.") from error
    _checked[path] = kind


def check_not_input(path: Path, inputs: Iterable[Path]) -> None:
    """Raise `ResultError` for a path that is one of the files which are read."""
    if path.exists() and any(other.exists() and other.samefile(path) for other in inputs):
        raise ResultError(f"cannot write '{path}': it is one of the result files; name another file.")


def make_folder(path: Path) -> None:
    """Make a folder, unless it is there. Raises `ResultError`."""
    if not path.parent.is_dir():
        raise ResultError(f"cannot make the folder '{path}': there is no folder '{path.parent}'.")
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise ResultError(f"cannot make the folder '{path}': {error.strerror}.") from error


def is_stdout(path: Path | None) -> bool:
    """Return whether stdout is for what is written, so that a table would spoil it."""
    return str(path) in _STDOUT


def is_stream(path: Path) -> bool:
    """Return whether what is written adds up, as in a pipe or on stdout: write to it once."""
    try:
        return is_stdout(path) or stat.S_ISFIFO(path.stat().st_mode) or _is_nowhere(path)
    except OSError:
        return False


def write_bytes(data: bytes, path: Path) -> None:
    """Write a file whole or not at all, or all of it to a pipe. Raises `ResultError`.

    The first time after `check_writable`, what was put there meanwhile is judged as well.
    """
    if path in _checked:
        check_writable(path, _checked[path])
    try:
        if is_stream(path):
            _send(data, path)
        else:
            _replace(data, _target(path))
    except OSError as error:
        raise ResultError(f"cannot write '{path}': {error.strerror}.") from error
    _checked.pop(path, None)
    written.append(path)


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
    elif _descriptor(path):
        return "it is the descriptor of an open file; name the file itself"
    elif not status.st_mode & 0o222 or not os.access(target, os.W_OK):
        return "it is write-protected"
    elif status.st_size and not (kind and kind.fits(outside.start(target, _START)[0])):
        what = kind.name if kind else "empty"
        return f"it exists and is not {what}; remove it or name another file"
    elif _is_mounted(target):
        return "it is a mount point and cannot be replaced; name another file"
    elif _is_kept(status, target.parent.stat()):
        return "it belongs to another user, and only its owner may replace it there; name another file"
    handle, name = tempfile.mkstemp(dir=target.parent)
    os.close(handle)
    os.unlink(name)
    return ""


def _target(path: Path) -> Path:
    """Return the file that a link leads to, there or not."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _descriptor(path: Path) -> Path | None:
    """Return the descriptor that a path or its links lead to, such as /proc/7/fd/2; None for other files."""
    while True:
        path = Path(os.path.realpath(path.parent), path.name)
        if re.fullmatch(r"/dev/fd|/proc/\d+(/task/\d+)?/fd", str(path.parent)):
            return path
        if not path.is_symlink():
            return None
        path = path.parent / os.readlink(path)


def _is_mounted(path: Path) -> bool:
    """Return whether a file is a mount point, as containers get single files; `ismount` may overlook it."""
    try:
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return os.path.ismount(path)
    return os.fsencode(os.path.realpath(path)) in {line.split()[4] for line in mounts}


def _is_kept(file: os.stat_result, folder: os.stat_result) -> bool:
    """Return whether a file lies in a sticky folder, as /tmp is, and neither of them is ours."""
    return bool(folder.st_mode & stat.S_ISVTX) and os.geteuid() not in (0, file.st_uid, folder.st_uid)


def _is_nowhere(path: Path) -> bool:
    return os.path.realpath(path) == os.devnull


def _unread(path: Path) -> str:
    """Open a pipe until it is written to; return why that cannot be."""
    if path in _pipes:
        return ""
    number = console.descriptor(console.results_stream()) if is_stdout(path) else _own(path)
    try:
        if number is not None:
            os.write(number, b"")
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        return "it is closed, or open for reading"
    if is_stdout(path) or _is_nowhere(path):
        return ""
    try:
        _pipes[path] = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return "it is a pipe that no process reads from"
    os.set_blocking(_pipes[path], True)
    return ""


def _own(path: Path) -> int | None:
    """Return the number of a descriptor of this process; None for other paths."""
    link = _descriptor(path)
    if link is None or str(link.parent) not in ("/dev/fd", f"/proc/{os.getpid()}/fd"):
        return None
    return int(link.name) if link.name.isdigit() else None


def _send(data: bytes, path: Path) -> None:
    """Write to a pipe or to stdout."""
    if is_stdout(path):
        stream = console.results_stream()
        stream.flush()
        number = console.descriptor(stream)
        if number is None:  # of whoever calls us, as in a notebook
            print(data.decode(), end="", file=stream, flush=True)
            return
        target = os.dup(number)
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
            with contextlib.suppress(FileNotFoundError):  # Ctrl-C came after the replacement
                os.unlink(file.name)
            raise
