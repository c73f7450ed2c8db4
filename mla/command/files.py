"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from mla.errors import ResultError

written: list[Path] = []  # by this process


def check_writable(path: Path) -> None:
    """Raise `ResultError` before a long run rather than after it."""
    folder = path.parent
    try:
        if path.is_dir():
            raise ResultError(f"cannot write '{path}': it is a folder.")
        if path.exists() and not path.is_file():  # renaming onto /dev/null would destroy it
            raise ResultError(f"cannot write '{path}': it is not a regular file.")
        if not folder.is_dir():
            raise ResultError(f"cannot write '{path}': there is no folder '{folder}'.")
        handle, name = tempfile.mkstemp(dir=folder)
        os.close(handle)
        os.unlink(name)
    except OSError as error:
        raise ResultError(f"cannot write '{path}': {error.strerror}.") from error


def write_bytes(data: bytes, path: Path) -> None:
    """Write a file whole or not at all. Raises `ResultError`."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                file.write(data)
                file.flush()
                os.chmod(file.name, 0o644)
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise ResultError(f"cannot write '{path}': {error.strerror}.") from error
    written.append(path)
