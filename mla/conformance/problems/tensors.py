"""Tensors for checks of small ops: seeded, optionally slices of wider ones."""

from __future__ import annotations

import torch

from mla.conformance.trial import expect

MARGIN = 16  # columns on either side of a slice


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Return N(0, 1) on the host."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def angles(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """Return [tokens, width] fp32: cosines and then sines of angles all around the circle."""
    turn = 3 * draw(tokens, width // 2, seed=seed)
    return torch.cat((turn.cos(), turn.sin()), dim=1)


def place(tensor: torch.Tensor, device: torch.device, strided: bool) -> torch.Tensor:
    """Copy to the device; if strided, into columns of a wider tensor full of NaN."""
    if not strided:
        return tensor.to(device, copy=True)
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 2 * MARGIN), torch.nan, dtype=tensor.dtype)
    part = wide.to(device)[..., MARGIN:-MARGIN]
    part.copy_(tensor)
    return part


def blank(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, strided: bool) -> torch.Tensor:
    """Return memory full of NaN to write to."""
    return place(torch.full(shape, torch.nan, dtype=dtype), device, strided)


def expect_margin(part: torch.Tensor) -> None:
    """Raise `CheckFailed` unless the columns around a strided `place` are still NaN."""
    shape = (*part.shape[:-1], part.shape[-1] + 2 * MARGIN)
    wide = part.as_strided(shape, part.stride(), part.storage_offset() - MARGIN).cpu()
    untouched = wide[..., :MARGIN].isnan().all() and wide[..., -MARGIN:].isnan().all()
    expect(bool(untouched), "memory next to `out` was written")
