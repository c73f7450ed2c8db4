"""Kernels that were compiled here, in the user's cache folder.

A build happens in a private folder that is renamed into place: one that is killed leaves nothing broken.
Processes that start at once wait for the first. Nothing is loaded that another user could have written.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mla_backend_cpu.compilation import artifact, compiler
from mla_backend_cpu.compilation.artifact import Artifact
from mla_backend_cpu.compilation.levels import BuildError, Level
from mla_backend_cpu.console import note
from mla_backend_cpu.trust import distrust, distrust_open

_ANOTHER = "set MLA_CACHE_DIR to a folder that only you can write"


def find(level: Level) -> Artifact | None:
    """Return the kernels that the present compiler has made, or the newest of any if there is no compiler.

    Raises `BuildError` if the compiler does not say its version.
    """
    name = artifact.name(level)
    try:
        which = _version(compiler.find())
    except compiler.NoCompiler:
        which = "*"
    try:
        kept = folder()
        if distrust(kept):
            return None
        made = sorted(kept.glob(f"{name}-{which}"), key=_age)
    except (BuildError, OSError):  # `make` says why
        return None
    return next(filter(None, map(_opened, made)), None)


def make(level: Level, since: str) -> Artifact:
    """Compile the kernels of a level and keep them; say so on stderr, and why. Raises `BuildError`."""
    command = _compiler()
    kept = prepare() / f"{artifact.name(level)}-{_version(command)}"
    compiler.check(command, level)
    with _alone(kept.parent / f".{level.name}.lock", level):
        if found := _opened(kept):  # by another process in the meantime
            return found
        note(f"building the CPU kernels for {level.name}, once, with {command[0]}, since {since} ...")
        try:
            found = _build(command, level, kept)
        except OSError as error:
            raise _not_stored(error) from error
    if found is None:
        raise BuildError(f"built kernels cannot be stored: '{kept}' cannot be replaced ({_ANOTHER})")
    return found


@contextlib.contextmanager
def _alone(path: Path, level: Level) -> Iterator[None]:
    """Hold a lock, so that processes that start at once compile once; it goes with a process that dies.

    Without one where the file system has none, or while another process takes longer than a compiler may.
    """
    import fcntl  # not on Windows

    try:
        descriptor = os.open(
            path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600
        )
    except OSError:
        yield
        return
    try:
        deadline, told = time.monotonic() + compiler.TIMEOUT, False
        while time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    note(f"waiting for another process that builds the CPU kernels for {level.name} ...")
                told = True
                time.sleep(0.1)
            except OSError:
                break
            else:
                break
        yield
    finally:
        with contextlib.suppress(OSError):  # a child that was forked meanwhile holds the descriptor, too
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def prepare() -> Path:
    """Make the folder of the built kernels and return it. Raises `BuildError` if it cannot be used."""
    kept = folder()
    _examine(kept, partly=True)
    try:
        _make_folders(kept)
    except OSError as error:
        raise _not_stored(error) from error
    _examine(kept)  # others may have made part of it in the meantime
    return kept


def _examine(kept: Path, partly: bool = False) -> None:
    """Raise `BuildError` if others can write the folder of the built kernels, or what exists of it."""
    if reason := distrust(kept, partly):
        raise BuildError(f"the cache of built kernels is not used: {reason} ({_ANOTHER})")


def _compiler() -> tuple[str, ...]:
    """Return the command of the compiler. Raises `NoCompiler`, which says if the cache is no use either."""
    try:
        return compiler.find()
    except compiler.NoCompiler as missing:
        try:
            _examine(folder(), partly=True)
        except BuildError as error:
            raise compiler.NoCompiler(f"{missing}, and {error}") from error
        raise


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
        raise BuildError(f"this user has no home folder to keep built kernels in ({_ANOTHER})")
    return Path(os.path.realpath(os.path.join(base, "mla", "cpu")))


def _opened(kept: Path) -> Artifact | None:
    """Return kernels, unless they are damaged or others could have written them."""
    if distrust(kept / artifact.LIBRARY):
        return None
    found = artifact.opened(kept)
    if found and distrust_open(found.descriptor):
        os.close(found.descriptor)
        return None
    return found


def _version(command: tuple[str, ...]) -> str:
    """Return a digest of the compiler and the arguments that CXX adds, such as -O0."""
    words = (compiler.version(command), *command[1:])
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:8]


def _age(made: Path) -> float:
    with contextlib.suppress(OSError):
        return -made.stat().st_mtime
    return 0.0


def _build(command: tuple[str, ...], level: Level, kept: Path) -> Artifact | None:
    _sweep(kept.parent)
    private = Path(tempfile.mkdtemp(prefix=".building-", dir=kept.parent))
    try:
        artifact.make(command, level, private)
        private.chmod(0o755)  # an image may be built by root and run by another user
        with contextlib.suppress(OSError):  # there are some: of another process, or damaged
            private.rename(kept)
        found = _opened(kept)
        if found is None:
            shutil.rmtree(kept, ignore_errors=True)
            with contextlib.suppress(OSError):
                private.rename(kept)
            found = _opened(kept)
        return found
    finally:
        shutil.rmtree(private, ignore_errors=True)


def _make_folders(folder: Path) -> None:
    """Make a folder and those above it so that only this user can write them, whatever the umask."""
    if not folder.is_dir():
        _make_folders(folder.parent)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o755)


def _sweep(folder: Path) -> None:
    """Remove what killed builds have left."""
    for private in folder.glob(".building-*"):
        with contextlib.suppress(OSError):  # its owner has just finished
            if time.time() - private.stat().st_mtime > 3 * compiler.TIMEOUT:
                shutil.rmtree(private, ignore_errors=True)
