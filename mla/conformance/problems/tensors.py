"""Tensors for checks of small ops: seeded, and on the device amid memory that nobody may read or write."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mla.conformance.trial import expect

GUARD = 32  # rows before and behind a tensor, where a kernel writes that rounds its rows up
MARGIN = 16  # columns on either side of a slice
NEIGHBOURS = 1  # heads on either side of a slice


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Return N(0, 1) on the host."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def angles(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """Return [tokens, width] fp32: cosines and then sines of angles all around the circle."""
    turn = 3 * draw(tokens, width // 2, seed=seed)
    return torch.cat((turn.cos(), turn.sin()), dim=1)


@dataclass(frozen=True)
class Placed:
    """A tensor on the device, and the memory that it is a part of."""

    part: torch.Tensor
    whole: torch.Tensor
    before: torch.Tensor  # `whole` on the host, as it was placed
    where: tuple[slice, ...]  # of `whole` is `part`

    def expect_unchanged(self, name: str) -> None:
        """Raise `CheckFailed` if the tensor or memory around it has changed."""
        self._expect(name, self.before[self.where])

    def expect_guards(self, name: str) -> None:
        """Raise `CheckFailed` if memory around the tensor has changed."""
        self._expect(name, None)

    def _expect(self, name: str, inside: torch.Tensor | None) -> None:
        now, then = self.whole.cpu(), self.before.clone()
        own = now[self.where]
        then[self.where] = own
        changed = (bits(now) != bits(then)).flatten(1).any(1)
        expect(not bool(changed.any()), f"memory {self._side(changed)} `{name}` was written")
        if inside is not None:
            expect(
                bool((bits(own) == bits(inside)).all()), f"the op wrote to {name}, which was not its output"
            )

    def _side(self, changed: torch.Tensor) -> str:
        rows, first = self.where[0], int(changed.int().argmax())
        if first < rows.start:
            return "before the first row of"
        return "behind the last row of" if first >= rows.stop else "beside rows of"


def place(
    tensor: torch.Tensor,
    device: torch.device,
    strided: bool = False,
    *,
    fill: float = math.nan,
    guard: int = GUARD,
) -> Placed:
    """Copy to the device, between `guard` rows full of `fill`.

    If strided, a tensor of two or more dimensions becomes a slice of a wider one in the others as well.
    """
    around = [guard] + [0] * (tensor.dim() - 1)
    if strided and tensor.dim() > 1:
        around = [guard, *[NEIGHBOURS] * (tensor.dim() - 2), MARGIN]
    pairs = list(zip(tensor.shape, around, strict=True))
    where = tuple(slice(beside, beside + size) for size, beside in pairs)
    before = torch.full([size + 2 * beside for size, beside in pairs], fill, dtype=tensor.dtype)
    before[where] = tensor
    whole = before.to(device, copy=True)
    return Placed(whole[where], whole, before, where)


def blank(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, strided: bool = False) -> Placed:
    """Return memory full of NaN to write to."""
    return place(torch.full(shape, torch.nan, dtype=dtype), device, strided)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a host tensor [n, ...] as [n, ..., bytes], so that NaN equals NaN."""
    return tensor.contiguous().unsqueeze(-1).view(torch.uint8)
