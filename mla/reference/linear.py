"""Projections."""

from __future__ import annotations

from typing import Any

import torch

from mla_backends.api import OPS, FusedOp


class Linear(FusedOp):
    """y = x W^T + b."""

    contract = OPS["linear"]

    def __call__(self, packed: Any, *, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        weight = packed.data  # [o, i]
        if bias is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(bias, x, weight.t(), out=out)


class BatchedLinear(FusedOp):
    """out[t, h, o] = sum_i x[t, h, i] W[h, o, i]: one weight per head."""

    contract = OPS["batched_linear"]

    def __call__(self, packed: Any, *, x: torch.Tensor, out: torch.Tensor) -> None:
        out.transpose(0, 1).copy_(torch.bmm(x.transpose(0, 1), packed.data.transpose(1, 2)))
