"""Operands amid memory that belongs to nobody, and what is wrong with outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

AROUND = 77.0  # what outputs lie in
ROW_ERROR = {torch.bfloat16: 1.2e-2, torch.float16: 2e-3, torch.float32: 1e-5}  # relative, of one row
LSE_ERROR = 1e-3
NO_PAGE = 10**9


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Return N(0, 1) numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dataclass
class Amid:
    """A tensor `part` as a strided part of `whole`, which holds something else around it."""

    whole: torch.Tensor
    part: torch.Tensor
    _before: torch.Tensor

    def intact(self) -> bool:
        """Return whether nothing around the part has changed."""
        now = self.whole.clone()
        now.as_strided(self.part.shape, self.part.stride(), self.part.storage_offset()).fill_(0)
        return torch.equal(now, self._before)


def amid(tensor: torch.Tensor, fill: float) -> Amid:
    """Return a copy with two rows of `fill` before and behind it, and some of it behind every row."""
    sizes = [tensor.shape[0] + 4, *(size + 3 for size in tensor.shape[1:])]
    whole = torch.full(sizes, fill, dtype=tensor.dtype)
    part = whole[(slice(2, -2), *(slice(0, -3) for _ in sizes[1:]))]
    part.fill_(0)
    before = whole.clone()
    part.copy_(tensor)
    return Amid(whole, part, before)


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy amid NaN."""
    return amid(tensor, torch.nan).part


def output(*shape: int, dtype: torch.dtype) -> Amid:
    """Return an output full of NaN, amid numbers that must stay."""
    return amid(torch.full(shape, torch.nan, dtype=dtype), AROUND)


def differences(out: Amid, truth: torch.Tensor) -> list[str]:
    """Return what is wrong with rows [.., d]: a row of zeros must be zeros."""
    found, sizes = out.part.double(), truth.norm(dim=-1)
    errors = (found - truth).norm(dim=-1)
    allowed = ROW_ERROR[out.part.dtype] * sizes
    bad = ~(errors <= allowed)  # NaN is not
    said = [f"{int(bad.sum())} of {bad.numel()} rows are wrong"] if bad.any() else []
    return said + ["memory around the output was written"] * (not out.intact())


def lse_differences(lse: Amid, truth: torch.Tensor) -> list[str]:
    """Return what is wrong with log-sum-exps, -inf included."""
    same = torch.where(truth.isinf(), lse.part.double() == truth, (lse.part - truth).abs() <= LSE_ERROR)
    said = [] if same.all() else [f"{int((~same).sum())} of {same.numel()} log-sum-exps are wrong"]
    return said + ["memory around the log-sum-exps was written"] * (not lse.intact())
