"""Tensors as they lie in memory: with their strides, what is between their rows, and what they share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import msgspec
import torch

from mla.cases.memory import Tensors

# What an op writes, besides the cache.
OUTPUTS = ("out", "lse")
# So many numbers before and behind an output are copied with it, if its memory has them: an op may hit them.
BESIDE = 1 << 16
# A size, a stride or a length in a file.
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]


class View(msgspec.Struct, frozen=True):
    """Where a tensor lies in a copied piece of memory."""

    memory: str
    offset: Count
    shape: list[Count]
    stride: list[Count]

    def of(self, memory: torch.Tensor) -> torch.Tensor:
        """Return the tensor in a piece of memory."""
        return torch.as_strided(memory, self.shape, self.stride, self.offset)


class Pages(msgspec.Struct, frozen=True):
    """A paged cache of which only some pages were copied; `fill` is in all others."""

    shape: list[Count]
    stride: list[Count]
    fill: float | None  # None is NaN

    @property
    def numbers(self) -> int:
        """How many numbers the cache holds."""
        return math.prod(self.shape)

    def empty(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return a cache that holds `fill` everywhere."""
        cache = torch.empty_strided(self.shape, self.stride, dtype=dtype, device=device)
        return cache.fill_(torch.nan if self.fill is None else self.fill)


def views(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, View], dict[str, torch.Tensor]]:
    """Return where tensors lie, and the pieces of memory [n] that hold them, not yet copied.

    A piece is named after its first tensor, and holds all that lies between the tensors of one storage;
    beside outputs it holds more.
    """
    found: dict[str, View] = {}
    pieces: dict[str, torch.Tensor] = {}
    for members in _by_storage(tensors):
        first = min(int(tensor.storage_offset()) for tensor in members.values())
        stop = max(int(tensor.storage_offset()) + extent(tensor) for tensor in members.values())
        if not members.keys().isdisjoint(OUTPUTS):
            first, stop = _widened(next(iter(members.values())), first, stop)
        name = next(iter(members))
        pieces[name] = members[name].as_strided((stop - first,), (1,), first)
        for member, tensor in members.items():
            offset = int(tensor.storage_offset() - first)
            found[member] = View(name, offset, list(tensor.shape), list(tensor.stride()))
    return found, pieces


def _widened(tensor: torch.Tensor, first: int, stop: int) -> tuple[int, int]:
    """Return a range of a tensor's storage with as much, or `BESIDE`, on either side where there is any."""
    beside = max(BESIDE, stop - first)
    return max(0, first - beside), min(tensor.untyped_storage().nbytes() // tensor.itemsize, stop + beside)


def _by_storage(tensors: Mapping[str, torch.Tensor]) -> Iterator[Tensors]:
    groups: dict[Any, Tensors] = {}
    for name, tensor in tensors.items():
        groups.setdefault((storage(tensor), tensor.dtype), {})[name] = tensor
    yield from groups.values()


def storage(tensor: torch.Tensor) -> tuple[str, int]:
    """Return what identifies the memory that a tensor is a view of."""
    return (str(tensor.device), tensor.untyped_storage().data_ptr())


def extent(tensor: torch.Tensor) -> int:
    """Return how many numbers lie from the tensor's first to its last."""
    if not tensor.numel():
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def covered(view: View, size: int) -> torch.Tensor:
    """Return which numbers [size] of its piece of memory a tensor consists of."""
    inside = torch.zeros(size, dtype=torch.bool, device="cpu")
    if math.prod(view.shape):
        view.of(inside).fill_(True)
    return inside
