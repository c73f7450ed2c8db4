"""Tiny problems for the small ops, compared with the definition on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mla_backends.kernels.trial import TOLERANCE

if TYPE_CHECKING:
    import torch

    from mla_backends.api import AttentionSpec, FusedOp, NormSpec

TOKENS = 3
EPS = 1e-6
WRONG = "gives wrong results"


def try_rms_norm(op: FusedOp, spec: NormSpec) -> str:
    """Run an `rms_norm` op on a few rows; return what is wrong, "" if nothing."""
    x, weight = _draw((TOKENS, spec.features), spec), _draw((spec.features,), spec)
    out = _poisoned((TOKENS, spec.features), spec)
    op(x=x, weight=weight, eps=EPS, out=out)
    return _judge(out, _norm(x, weight))


def try_rotate_query(op: FusedOp, spec: AttentionSpec) -> str:
    """Run a `rotate_query` op both ways; return what is wrong, "" if nothing."""
    width = spec.qk_rope_head_dim
    x, cos_sin = _draw((TOKENS, spec.num_heads, width), spec), _angles(spec)
    for interleaved in (True, False):
        out = _poisoned((TOKENS, spec.num_heads, width), spec)
        op(x=x, cos_sin=cos_sin, interleaved=interleaved, out=out)
        if wrong := _judge(out, _rotate(x, cos_sin[:, None], interleaved)):
            return wrong
    return ""


def try_write_latent(op: FusedOp, spec: AttentionSpec) -> str:
    """Run a `write_latent` op both ways; return what is wrong, "" if nothing."""
    import torch

    latent, rope = spec.kv_lora_rank, spec.qk_rope_head_dim
    kv_a, weight, cos_sin = _draw((TOKENS, latent + rope), spec), _draw((latent,), spec), _angles(spec)
    slots = torch.tensor([5, 0, 2], device=spec.device)
    for interleaved in (True, False):
        cache = _poisoned((2, 4, latent + rope), spec)
        op(
            kv_a=kv_a,
            weight=weight,
            eps=EPS,
            cos_sin=cos_sin,
            interleaved=interleaved,
            slots=slots,
            cache=cache,
        )
        parts = (_norm(kv_a[:, :latent], weight), _rotate(kv_a[:, latent:], cos_sin, interleaved))
        if wrong := _judge(cache.cpu().view(8, -1)[slots.cpu()], torch.cat(parts, dim=1)):
            return wrong
    return ""


def _draw(shape: tuple[int, ...], spec: NormSpec | AttentionSpec) -> torch.Tensor:
    import torch

    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator, device="cpu").to(spec.dtype).to(spec.device)


def _poisoned(shape: tuple[int, ...], spec: NormSpec | AttentionSpec) -> torch.Tensor:
    import torch

    return torch.full(shape, torch.nan, dtype=spec.dtype, device=spec.device)


def _angles(spec: AttentionSpec) -> torch.Tensor:
    """Return cos_sin [TOKENS, r] fp32."""
    import torch

    pairs = spec.qk_rope_head_dim // 2
    angles = torch.arange(TOKENS * pairs, device="cpu").view(TOKENS, pairs).float()
    return torch.cat((angles.cos(), angles.sin()), dim=1).to(spec.device)


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.cpu().float()
    return wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.cpu().float()


def _rotate(x: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    import torch

    cos, sin = cos_sin.cpu().chunk(2, dim=-1)
    wide = x.cpu().float()
    a, b = (wide[..., 0::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    return torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)


def _judge(out: torch.Tensor, right: torch.Tensor) -> str:
    if right.numel() == 0:
        return ""
    error = (out.cpu().float() - right).abs().amax()
    return "" if bool(error <= TOLERANCE * right.abs().amax()) else WRONG  # NaN is not either
