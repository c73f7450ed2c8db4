"""The small ops in plain PyTorch: projections, norm, rotation and the cache write."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Collection

import torch

from mla.cache.formats import codec_of
from mla_backends.api import OPS, FusedOp, Packed


class Linear(FusedOp):
    """y = x W^T + b."""

    contract = OPS["linear"]

    def __call__(
        self, packed: Packed, *, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        weight = packed.data  # [o, i]
        if x.shape[1] % 64 and not x.is_contiguous():
            x = x.contiguous()  # AMX reads numbers behind rows, times zero: NaN, if NaN
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


# ---------------------------------------------------------------------------------------- pointwise
# RMSNorm, rotation, and the cache write that joins them; fp32 inside, rounded once.
class RmsNorm(FusedOp):
    """x / rms(x) * weight, rounded once."""

    contract = OPS["rms_norm"]

    def __call__(self, *, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        out.copy_(rms_norm(x, weight, eps))


class RotateQuery(FusedOp):
    """Rotate every head of x by its token's angles."""

    contract = OPS["rotate_query"]

    def __call__(
        self, *, x: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool, out: torch.Tensor
    ) -> None:
        out.copy_(rotate(x, cos_sin[:, None, :], interleaved))


class OfFormats(FusedOp):
    """An op of the cache that goes by the codecs, and so serves any format; it claims what is given."""

    def __init__(self, formats: Collection[str] = ()) -> None:
        self.cache_formats = formats


class WriteLatent(OfFormats):
    """Norm the latent, rotate the shared key, scatter both to the cache."""

    contract = OPS["write_latent"]
    encodes_rounded = True

    def __call__(
        self,
        *,
        kv_a: torch.Tensor,  # [T, c + r]
        weight: torch.Tensor,  # [c]
        eps: float,
        cos_sin: torch.Tensor,  # [T, r] fp32
        interleaved: bool,
        slots: torch.Tensor,  # [T] int64
        cache: torch.Tensor,  # [pages, page, c + r], or bytes
        cache_format: str = "",
    ) -> None:
        widths = weight.shape[0], cos_sin.shape[1]
        latent, key = kv_a.split(widths, dim=1)
        made = rms_norm(latent, weight, eps), rotate(key, cos_sin, interleaved)
        codec = codec_of(cache_format, *widths)
        row = torch.cat(made, dim=1).to(kv_a.dtype)
        row = row if codec is None else codec.encode(*row.split(widths, dim=1))
        cache.flatten(0, 1).index_copy_(0, slots, row)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * scale * weight


def rotate(x: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Return x [.., r] rotated by cos_sin [.., r] (cosines, then sines), in fp32.

    Interleaved: channels (0, 1), (2, 3), ... are the pairs, as in DeepSeek's checkpoints, and stay in that
    order. Otherwise channel i pairs with i + r/2.
    """
    cos, sin = cos_sin.chunk(2, dim=-1)
    wide = x.float()
    a, b = (wide[..., 0::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
    pair = ((a * cos).addcmul_(b, sin, value=-1), (a * sin).addcmul_(b, cos))
    return torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
