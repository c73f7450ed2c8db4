"""Operands in the middle of larger memory, which tells whether anything was written around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from mla.conformance.problems.reach import allocate

ROWS = 16  # before the first row, and behind the last
# What a strided operand has before and behind it in each dimension after the first, by their number.
MARGINS: dict[int, Sequence[tuple[int, int]]] = {0: (), 1: ((4, 4),), 2: ((0, 1), (16, 16))}


class Guarded(NamedTuple):
    """An operand, and the memory that it is a part of."""

    part: torch.Tensor
    whole: torch.Tensor
    place: tuple[slice, ...]  # of the part
    fill: float  # all around the part

    def intact(self) -> bool:
        """Return whether the memory around the operand holds what it was filled with."""
        first = self.place[0]
        around = [self.whole[: first.start], self.whole[first.stop :]]
        if not self.part.is_contiguous():
            copy = self.whole.detach().clone()
            copy[self.place] = self.fill
            around = [copy]
        untouched = (part == self.fill if self.fill == self.fill else part.isnan() for part in around)
        return all(bool(found.all()) for found in untouched)


def guarded(tensor: torch.Tensor, device: torch.device, fill: float, strided: bool = False) -> Guarded:
    """Copy [n, ...] to the device, with rows of `fill` around it; if strided, with more in every dimension.

    Elements of the last dimension stay adjacent.
    """
    margins = ((ROWS, ROWS), *(MARGINS[tensor.dim() - 1] if strided else ((0, 0),) * (tensor.dim() - 1)))
    pairs = list(zip(tensor.shape, margins, strict=True))
    shape = [before + size + behind for size, (before, behind) in pairs]
    whole = torch.full(shape, fill, dtype=tensor.dtype, device=device)
    place = tuple(slice(before, before + size) for size, (before, _) in pairs)
    part = whole[place]
    part.copy_(tensor)
    return Guarded(part, whole, place, fill)


def scattered(tensor: torch.Tensor, device: torch.device, apart: int) -> torch.Tensor:
    """Copy the rows of [n, h, d] to the device, so many numbers apart. What is between them is never touched.

    Raises `Refused` if that takes more memory than there is.
    """
    whole = allocate((tensor.shape[0] * apart,), tensor.dtype, device)
    part = whole.as_strided(tensor.shape, (apart, tensor.shape[2], 1))
    for row, values in zip(part, tensor, strict=True):  # an index could be too narrow, too
        row.copy_(values)
    return part
