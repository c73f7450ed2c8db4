"""Projections."""

from __future__ import annotations

import functools
import warnings

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
        writes_in_place(rows.device, rows.dtype)  # asked here, where the host may wait for the device
        return Packed(rows, rows.nbytes)

    def unpack(self, packed: Packed) -> torch.Tensor:
        return packed.data.transpose(1, 2)

    def __call__(self, packed: Packed, *, x: torch.Tensor, out: torch.Tensor) -> None:
        by_head, target = x.transpose(0, 1), out.transpose(0, 1)
        if writes_in_place(out.device, out.dtype):
            torch.bmm(by_head, packed.data, out=target)
        else:
            target.copy_(torch.bmm(by_head, packed.data))


@functools.cache
def writes_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether `bmm` is used with an output that is a slice, which saves a copy and its memory.

    On the CPU it takes as long in bf16 and longer in fp32 (decode sizes, torch 2.13). Elsewhere it is tried
    once: some stacks refuse such an output, or warn that they would give it other memory.
    """
    return device.type != "cpu" and serves_slices(device, dtype)


def serves_slices(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether `bmm` writes right numbers to a slice of a wider tensor, and nothing beside it."""
    numbers = functools.partial(torch.arange, dtype=torch.float32, device=device)  # exact in any dtype
    x, weight = numbers(12).view(3, 2, 2).to(dtype), numbers(16).view(2, 2, 4).to(dtype)
    wide = torch.full((3, 2, 6), 7.0, dtype=dtype, device=device)
    expected = wide.clone()
    expected[..., :4] = torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.bmm(x.transpose(0, 1), weight, out=wide[..., :4].transpose(0, 1))
        return torch.equal(wide, expected)
    except Exception:  # noqa: BLE001  # vendor stacks raise anything
        return False
