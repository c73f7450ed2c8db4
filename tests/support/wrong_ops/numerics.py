"""Small ops that are inaccurate."""

from __future__ import annotations

from typing import Any

import torch

from mla_backends.api import FusedOp, Packed
from wrong_ops.base import Tensor, after, changing, mutant, overwrite, written


def narrow_sums(kind: str, tile: int, dtype: torch.dtype) -> FusedOp:
    """The sum of a product is kept in a narrow dtype between tiles of inputs."""

    def body(right: Any, packed: Packed, *, x: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
        sums = torch.zeros(out.shape, dtype=dtype)
        for first in range(0, x.shape[-1], tile):
            part = slice(first, first + tile)
            sums += _product(x[..., part], packed.data, part).to(dtype)
        out.copy_(sums if bias is None else sums.float() + bias)

    return mutant(kind, body)


def split_sums(kind: str, splits: int) -> FusedOp:
    """Each part of a split product is rounded to the dtype of the output."""

    def body(right: Any, packed: Packed, *, x: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
        size = -(-x.shape[-1] // splits)
        parts = [slice(first, first + size) for first in range(0, x.shape[-1], size)]
        sums = sum(_product(x[..., part], packed.data, part).to(out.dtype).float() for part in parts)
        out.copy_(sums if bias is None else sums + bias)

    return mutant(kind, body)


def _product(x: Tensor, weight: Tensor, part: slice) -> Tensor:
    """Multiply columns of x by those of a weight as the reference packs it: [o, i], or [h, i, o]."""
    if x.dim() == 2:
        return x.float() @ weight[:, part].float().T
    return torch.einsum("thi,hio->tho", x.float(), weight[:, part].float())


def eight_bits(kind: str, by: str, name: str = "x") -> FusedOp:
    """Inputs are rounded to 8 bits, with one scale for all of them or one per row."""

    def rounded(x: Tensor) -> Tensor:
        if not x.numel():
            return x
        largest = (
            x.abs().amax() if by == "call" else x.abs().flatten(1).amax(1).view(-1, *(1,) * (x.dim() - 1))
        )
        step = largest.float().clamp_min(1e-30) / 127
        return ((x / step).round() * step).to(x.dtype)

    return changing(kind, name, rounded)


def flushes_small(kind: str, least: float) -> FusedOp:
    """Rows that are so much smaller than the largest one of the call become zeros."""

    def spoil(given: dict[str, Any]) -> None:
        sizes = given["kv_a" if "cache" in given else "x"].float().flatten(1).norm(dim=1)
        if len(sizes):
            rows = written(given)
            rows[sizes < least * sizes.amax()] = 0
            overwrite(given, rows)

    return after(kind, spoil)


def narrow_squares(tile: int) -> FusedOp:
    """The sum of squares is kept in bfloat16 between tiles of features."""

    def body(right: Any, *, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        total = torch.zeros(len(x), 1, dtype=torch.bfloat16)
        for part in x.float().square().split(tile, dim=1):
            total += part.sum(1, keepdim=True).bfloat16()
        mean = total.float() / x.shape[1]
        out.copy_(x.float() * torch.rsqrt(mean + eps) * weight)

    return mutant("rms_norm", body)
