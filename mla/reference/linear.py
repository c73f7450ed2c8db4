"""Projections."""

from __future__ import annotations

import torch

from mla_backends.api import OPS, FusedOp, Packed


class Linear(FusedOp):
    """y = x W^T + b."""

    contract = OPS["linear"]

    def __call__(
        self, packed: Packed, *, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        weight = packed.data  # [o, i]
        if bias is None:
            torch.mm(x, weight.t(), out=out)
        else:
            torch.addmm(bias, x, weight.t(), out=out)


class BatchedLinear(FusedOp):
    """out[t, h, o] = sum_i x[t, h, i] W[h, o, i]: one weight per head, kept as [h, i, o] for `bmm`."""

    contract = OPS["batched_linear"]

    def pack(self, weight: torch.Tensor) -> Packed:
        rows = weight.transpose(1, 2).contiguous()  # bmm would copy a transposed weight on every call
        return Packed(rows, rows.nbytes)

    def unpack(self, packed: Packed) -> torch.Tensor:
        return packed.data.transpose(1, 2)

    def __call__(self, packed: Packed, *, x: torch.Tensor, out: torch.Tensor) -> None:
        out.transpose(0, 1).copy_(torch.bmm(x.transpose(0, 1), packed.data))
