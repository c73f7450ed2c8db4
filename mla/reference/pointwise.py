"""RMSNorm, rotation, and the cache write that joins them; fp32 inside, rounded once."""

from __future__ import annotations

import torch

from mla_backends.api import OPS, FusedOp


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


class WriteLatent(FusedOp):
    """Norm the latent, rotate the shared key, scatter both to the cache."""

    contract = OPS["write_latent"]

    def __call__(
        self,
        *,
        kv_a: torch.Tensor,  # [T, c + r]
        weight: torch.Tensor,  # [c]
        eps: float,
        cos_sin: torch.Tensor,  # [T, r] fp32
        interleaved: bool,
        slots: torch.Tensor,  # [T] int64
        cache: torch.Tensor,  # [pages, page, c + r]
    ) -> None:
        latent, key = kv_a.split((weight.shape[0], cos_sin.shape[1]), dim=1)
        row = torch.cat((rms_norm(latent, weight, eps), rotate(key, cos_sin, interleaved)), dim=1)
        cache.view(-1, kv_a.shape[1]).index_copy_(0, slots, row.to(cache.dtype))


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
