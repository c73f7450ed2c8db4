"""Kernels that came with the installation, and those that were compiled here, in the user's cache folder.

A build happens in a private folder that is renamed into place: one that is killed leaves nothing broken. Of
processes that start at once, one builds, and the others wait. Nothing is loaded that another user could have
written: the cache, its folder of kernels and the file that was opened belong to this user, or root, who alone
may write them. Folders above decide which folder of this user is the cache, and not what is in it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mla_backend_cpu.compilation import (
    LIBRARY,
    Artifact,
    BuildError,
    Level,
    check_flags,
    find_compiler,
    kernels_name,
    make_kernels,
    opened_kernels,
)

# Made by hatch_build.py. Who can write them can write the Python beside them, which is trusted as well.
PREBUILT = Path(__file__).parent / "kernels"


def find_prebuilt(level: Level) -> Artifact | str:
    """Return the kernels of a level, or why there are none, as a clause."""
    if not PREBUILT.is_dir():
        return "no kernels came with this installation"
    folder = PREBUILT / kernels_name(level)
    if kernels := opened_kernels(folder):
        return kernels
    damaged = f"those that came with this installation are damaged: '{folder}'"
    return damaged if folder.is_dir() else "this installation came with kernels, but not with these"


# --------------------------------------------------------------------------------------- built here

_OTHER_FOLDER = "set MLA_CACHE_DIR to a folder that only you can write"


def find(level: Level) -> Artifact | None:
    """Return the kernels that were built here; None if there are none. Arguments in CXX make others."""
    try:
        return _opened(_place(folder(), level))
    except BuildError:  # `make` says why
        return None


def make(level: Level, since: str) -> Artifact:
    """Compile the kernels of a level and keep them; say so on stderr, and why. Raises `BuildError`."""
    command = find_compiler()
    kept = _place(prepare(), level)
    check_flags(command, level)
    with _alone(kept.parent / f".{level.name}.lock", level):
        if kernels := _opened(kept):  # by another process in the meantime
            return kernels
        note(f"building the CPU kernels for {level.name}, once, with {command[0]}, since {since} ...")
        try:
            kernels = _build(command, level, kept)
        except OSError as error:
            raise _not_stored(error) from error
    if kernels is None:
        raise BuildError(f"built kernels cannot be stored: '{kept}' cannot be replaced ({_OTHER_FOLDER})")
    return kernels


@contextlib.contextmanager
def _alone(path: Path, level: Level) -> Iterator[None]:
    """Hold a lock, which goes with a process that dies; a file system without locks has none."""
    import fcntl  # not on Windows

    with contextlib.ExitStack() as undo:
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
            undo.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                note(f"waiting for another process that builds the CPU kernels for {level.name} ...")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            undo.callback(fcntl.flock, descriptor, fcntl.LOCK_UN)  # a child forked meanwhile has it, too
        yield


def _place(parent: Path, level: Level) -> Path:
    """Return where the kernels of a level are kept that the compiler named by CXX makes."""
    return parent / f"{kernels_name(level)}-{zlib.crc32(os.environ.get('CXX', '').encode()):08x}"


def prepare() -> Path:
    """Make the folder of the built kernels and return it. Raises `BuildError` if it cannot be used."""
    kept = folder()
    try:
        for part in (*reversed(kept.parents), kept):  # of several, it would give the last one alone this mode
            os.makedirs(part, mode=0o755, exist_ok=True)
        reason = distrust(kept.stat())
    except OSError as error:
        raise _not_stored(error) from error
    if reason:
        raise BuildError(f"the cache of built kernels is not used: '{kept}' {reason} ({_OTHER_FOLDER})")
    return kept


def distrust(status: os.stat_result) -> str:
    """Return how other users may have written a file, or what is in a folder; "" if they may not.

    The bits of the group are the most that anybody named in an access list may do.
    """
    if status.st_uid not in (0, os.geteuid()):
        return f"belongs to user {status.st_uid}"
    others = stat.S_IWGRP | stat.S_IWOTH
    return "can be written by others" if status.st_mode & others else ""


def _not_stored(error: OSError) -> BuildError:
    return BuildError(f"built kernels cannot be stored: {error} (set MLA_CACHE_DIR to another folder)")


def folder() -> Path:
    """Return the folder of the built kernels, which may not exist, as a real path. Raises `BuildError`."""
    chosen, base = os.environ.get("MLA_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME", "")
    if chosen:
        if not os.path.isabs(chosen):
            raise BuildError(f"MLA_CACHE_DIR must be an absolute path, but is '{chosen}'")
        return Path(os.path.realpath(os.path.join(chosen, "cpu")))
    if not os.path.isabs(base):  # the specification of XDG_CACHE_HOME says that others are ignored
        base = os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(base):  # "~" stays what it is for a user without HOME and entry in /etc/passwd
        raise BuildError(f"this user has no home folder to keep built kernels in ({_OTHER_FOLDER})")
    return Path(os.path.realpath(os.path.join(base, "mla", "cpu")))


def _opened(kept: Path) -> Artifact | None:
    """Return kernels, unless they are damaged or others could have written them."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as undo:
        opened = os.open(kept.parent, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        undo.callback(os.close, opened)  # until then, who can write folders above cannot replace the cache
        inside = Path(f"/proc/self/fd/{opened}", kept.name)
        if distrust(os.fstat(opened)) or distrust(inside.lstat()):
            return None
        if kernels := opened_kernels(inside):
            if not distrust(os.fstat(kernels.descriptor)):
                return replace(kernels, path=kept / LIBRARY)
            os.close(kernels.descriptor)
    return None


def _build(command: tuple[str, ...], level: Level, kept: Path) -> Artifact | None:
    private = Path(tempfile.mkdtemp(prefix=".building-", dir=kept.parent))
    try:
        make_kernels(command, level, private)
        private.chmod(0o755)  # an image may be built by root and run by another user
        for _ in range(2):
            with contextlib.suppress(OSError):  # there are some: of another process, or damaged
                private.rename(kept)
            if kernels := _opened(kept):
                return kernels
            shutil.rmtree(kept, ignore_errors=True)
        return None
    finally:
        shutil.rmtree(private, ignore_errors=True)


def note(text: str) -> None:
    """Write a line to stderr: a user must be told even where nobody asks a backend for its remarks."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # stderr may be closed, or be None
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
