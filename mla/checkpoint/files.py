"""Safetensors files: headers, and rows of a tensor. No file stays open or mapped."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mla.checkpoint.errors import CheckpointError
from mla_backends import outside
from mla_backends.outside import escaped, quoted, shortened

# What `safetensors` itself accepts.
_MAX_HEADER = 100_000_000
_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: what the header says. `dtype` is spelled as in the header, such as "BF16"."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"tensor {quoted(self.key)} in '{self.file}'"

    def rows(self, start: int, stop: int, columns: slice = slice(None)) -> torch.Tensor:
        """Return rows [start, stop) of dimension 0, or some columns of them, as a view of the file.

        The file is mapped while the view lives, and again for every block: the pages read through a mapping
        count as this process's memory until it ends, so one mapping of a whole tensor would double what
        loading needs.
        """
        with opened(self.file) as tensors:
            stored = tensors.get_slice(self.key)
            part: torch.Tensor = stored[start:stop] if columns == slice(None) else stored[start:stop, columns]
        return part


def keys(file: Path) -> list[str]:
    """Return the names of a file's tensors. Raises `CheckpointError`."""
    _sniff(file)
    with opened(file) as tensors:
        return list(tensors.keys())


def headers(file: Path, names: Collection[str]) -> dict[str, StoredTensor]:
    """Return what the header says about the tensors in `names` that it lists. Raises `CheckpointError`."""
    _sniff(file)
    found = {}
    with opened(file) as tensors:
        for key in set(tensors.keys()).intersection(names):
            part = tensors.get_slice(key)
            found[key] = StoredTensor(file, key, tuple(part.get_shape()), part.get_dtype())
    return found


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """Open a file, and turn any failure into a `CheckpointError`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as tensors:
            yield tensors
    except MemoryError as error:
        raise CheckpointError(f"checkpoint file '{file}' cannot be read: memory is short.") from error
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        text = shortened(escaped(" ".join(str(error).split())))
        raise CheckpointError(
            f"checkpoint file '{file}' cannot be read, it is truncated or damaged: {text}."
        ) from error


def _sniff(file: Path) -> None:
    """Raise `CheckpointError` for first bytes that the library would describe less clearly."""
    try:
        start, size = outside.start(file, len(_LFS))
    except OSError as error:
        raise CheckpointError(f"checkpoint file '{file}' cannot be read: {error.strerror}.") from error
    if start == _LFS:
        raise CheckpointError(
            f"checkpoint file '{file}' is only a Git LFS pointer: fetch its content with `git lfs pull`."
        )
    if len(start) < 8:
        raise CheckpointError(f"checkpoint file '{file}' is truncated: it has {size} bytes.")
    length = int.from_bytes(start[:8], "little")
    if length > min(size - 8, _MAX_HEADER):
        raise CheckpointError(
            f"checkpoint file '{file}' is truncated or not a safetensors file: {size} bytes cannot hold a "
            f"header of {length}."
        )
