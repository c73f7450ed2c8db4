"""What every op must compute, in float64 on the host, written out independently of `reference/`.

The tests have a second float64 attention (`tests/support/float64_attention.py`), written independently of
this one, so that neither can hide a mistake of the other.
"""

from __future__ import annotations

import torch

from mla_backends.api import SegmentLengths

# The most bytes of float64 logits in one step.
LOGITS_BYTES = 256 << 20


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x [T, i] times weight [o, i] plus bias [o], or x [T, h, i] times a weight per head [h, o, i]."""
    if weight.dim() == 3:
        return torch.einsum("thi,hoi->tho", x.double(), weight.double())
    return x.double() @ weight.double().T + (0 if bias is None else bias.double())


def true_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight in float64."""
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def true_rotation(x: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Multiply channel pairs, as complex numbers, with cos + i sin, in float64; x [T, .., r]."""
    turn = torch.complex(*cos_sin.double().chunk(2, dim=-1))
    turn = turn.view(turn.shape[0], *(1,) * (x.dim() - 2), turn.shape[1])
    wide, half = x.double(), x.shape[-1] // 2
    if interleaved:
        return torch.view_as_real(
            torch.view_as_complex(wide.unflatten(-1, (half, 2)).contiguous()) * turn
        ).flatten(-2)
    turned = torch.complex(*wide.chunk(2, dim=-1)) * turn
    return torch.cat((turned.real, turned.imag), dim=-1)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend q [t, h, dk] over k [s, 1 or h, dk] and v [s, 1 or h, dv] in float64: out and lse [t, h].

    When causal, the last query sees the last key. A query that sees no key gives 0 and -inf.
    """
    tokens, keys = q.shape[0], k.shape[0]
    logits = torch.matmul(q.double().permute(1, 0, 2), k.double().permute(1, 2, 0)) * scale  # [h, t, s]
    if causal:
        future = torch.arange(keys)[None, :] > torch.arange(keys - tokens, keys)[:, None]
        logits = logits.masked_fill(future, -torch.inf)
    lse = logits.logsumexp(-1)
    if keys == 0:
        lse = torch.full(lse.shape, -torch.inf, dtype=torch.float64)
    weights = (logits - lse.clamp_min(-1e300)[..., None]).exp()
    out = torch.matmul(weights, v.double().permute(1, 0, 2))  # [h, t, dv]
    return out.permute(1, 0, 2), lse.T


def attend_requests(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: SegmentLengths, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend q [T, h, dk] request by request over k [K, 1 or h, dk] and v [K, 1 or h, dv], as `attend`.

    A few heads at a time, to keep the logits small.
    """
    found = []
    for own, keys, values in zip(
        q.split(list(lengths.query_lens)), *(x.split(list(lengths.kv_lens)) for x in (k, v)), strict=True
    ):
        count = max(1, LOGITS_BYTES // max(1, 8 * len(own) * len(keys)))
        parts = []
        for start in range(0, own.shape[1], count):
            heads = slice(start, start + count)
            k_part, v_part = (x if x.shape[1] == 1 else x[:, heads] for x in (keys, values))
            parts.append(attend(own[:, heads], k_part, v_part, scale, lengths.causal))
        found.append([torch.cat(part, dim=1) for part in zip(*parts, strict=True)])
    out, lse = (torch.cat(part) for part in zip(*found, strict=True))
    return out, lse
