"""What every op must compute, in float64 on the host, written out independently of `reference/`.

The tests have a second float64 attention (`tests/support/float64_attention.py`), written independently of
this one, so that neither can hide a mistake of the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch

from mla.verify.tolerances import half_subnormal
from mla_backends.api import SegmentLengths

Weights = Callable[[torch.Tensor], torch.Tensor] | None
Spans = Sequence[tuple[int, int]]  # of every query: the first key of its request, and how many it sees
# The most bytes of float64 logits in one step, before padding.
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


def true_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """Return (x - mean) / sqrt(variance + eps) * weight + bias in float64."""
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)  # torch.var warns where there is no row
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + eps).sqrt() * weight.double() + bias.double()


def true_rotation(x: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Multiply channel pairs, as complex numbers, with cos + i sin, in float64; x [T, .., r]."""
    turn = torch.complex(*cos_sin.double().chunk(2, dim=-1))
    turn = turn.view(turn.shape[0], *(1,) * (x.dim() - 2), turn.shape[1])
    wide = x.double()
    if interleaved:
        pairs = torch.complex(wide[..., 0::2], wide[..., 1::2])
        return torch.view_as_real(pairs * turn).flatten(-2)
    turned = torch.complex(*wide.chunk(2, dim=-1)) * turn
    return torch.cat((turned.real, turned.imag), dim=-1)


def attend_requests(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: SegmentLengths,
    scale: float,
    change: Weights = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend q [T, h, dk] over k [K, 1 or h, dk] and v [K, 1 or h, dv] in float64: out and lse [T, h].

    When causal, the last query of a request sees its last key. A query that sees no key gives 0 and -inf.
    Requests of similar lengths are attended together, padded. `change`: of weights, before they meet values.
    """
    out = torch.zeros((*q.shape[:2], v.shape[2]), dtype=torch.float64)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64)
    within = v.data_ptr() == k.data_ptr() and v.stride() == k.stride()  # values are columns of keys
    for rows, keys, hidden in alike(spans_of(lengths), q.shape[1]):
        wide = k[keys].double()
        values = wide[..., : v.shape[2]] if within else v[keys].double()
        out[rows], lse[rows] = _attend_padded(q[rows].double(), wide, values, hidden, scale, change)
    return out, lse


def spans_of(lengths: SegmentLengths) -> list[tuple[int, int]]:
    """Return the first key of its request of every query, and how many it sees."""
    first, spans = 0, list[tuple[int, int]]()
    for new, keys in zip(lengths.query_lens, lengths.kv_lens, strict=True):
        spans += [(first, max(0, keys - new + i + 1) if lengths.causal else keys) for i in range(new)]
        first += keys
    return spans


def lost_weights(weights: torch.Tensor) -> torch.Tensor:
    """Return by how much small weights change in float16: by half a subnormal, or themselves, at most."""
    small = weights < torch.finfo(torch.float16).smallest_normal
    return torch.where(small, weights.clamp_max(half_subnormal(torch.float16)), 0.0)


def alike(spans: Spans, heads: int = 1) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield queries that see keys, those of requests of similar sizes together, within `LOGITS_BYTES`.

    They are rows [n, t] and keys [n, s] of all, int64, padded by repeating the last; and `hidden` [n, t, s].
    """
    groups, start = defaultdict[tuple[int, int], list[tuple[int, int, int, int]]](list), 0
    for first, of_request in groupby(spans, lambda span: span[0]):
        seen = [count for _, count in of_request]
        most = max(1, LOGITS_BYTES // (8 * heads * max(1, *seen)))
        for at in range(0, len(seen), most):
            run = seen[at : at + most]
            if max(run):
                sizes = len(run).bit_length(), max(run).bit_length()
                groups[sizes].append((start + at, len(run), first, max(run)))
        start += len(seen)
    visible = torch.tensor([seen for _, seen in spans])
    for (query_bits, key_bits), runs in groups.items():
        together = max(1, LOGITS_BYTES // (8 * heads << query_bits + key_bits))
        for at in range(0, len(runs), together):
            query, count, first_key, keys = torch.tensor(runs[at : at + together])[..., None].unbind(1)
            rows = query + torch.arange(int(count.max())).minimum(count - 1)
            key = torch.arange(int(keys.max()))
            yield rows, first_key + key.minimum(keys - 1), key >= visible[rows][..., None]


def _attend_padded(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor, scale: float, change: Weights
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend q [n, t, h, dk] over k [n, s, 1 or h, dk] and v in float64, but for `hidden` [n, t, s] pairs."""
    tokens, shared = q.shape[1], q.shape[2] // k.shape[2]  # queries that share a head of keys
    wide = q.unflatten(2, (-1, shared)).permute(0, 2, 1, 3, 4).flatten(2, 3)  # [n, heads, t g, dk]
    logits = (wide @ k.permute(0, 2, 3, 1)).mul_(scale).unflatten(2, (tokens, shared))
    logits.masked_fill_(hidden[:, None, :, None], -torch.inf)
    lse = logits.logsumexp(-1)
    weights = logits.sub_(lse.clamp_min(-1e300)[..., None]).exp_().flatten(2, 3)
    weights = change(weights) if change else weights
    out = (weights @ v.permute(0, 2, 1, 3)).unflatten(2, (tokens, shared))
    return tuple(x.transpose(1, 2).flatten(2, 3) for x in (out, lse))


# ------------------------------------------------------------------------------------------------- sparse


def attend_selected(
    q: torch.Tensor,  # [T, h, dk]
    k: torch.Tensor,  # [K, dk]
    v: torch.Tensor,  # [K, dv]
    chosen: torch.Tensor,  # [T, n] int64: rows of k, or -1
    scale: float,
    change: Weights = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend each query to its own keys in float64, a few queries at a time: out [T, h, dv] and lse [T, h].

    A query that is given no key gives 0 and -inf. `change`: of weights, before they meet values.
    """
    out = torch.zeros((*q.shape[:2], v.shape[1]), dtype=torch.float64)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64)
    together = max(1, LOGITS_BYTES // (8 * max(1, chosen.shape[1]) * (q.shape[1] + q.shape[2])))
    for first in range(0, len(q) if len(k) else 0, together):
        run = slice(first, first + together)
        rows, absent = chosen[run].clamp_min(0), (chosen[run] < 0)[:, None]
        keys, values = (x[rows].double()[:, :, None] for x in (k, v))
        attended = _attend_padded(q[run, None].double(), keys, values, absent, scale, change)
        out[run], lse[run] = (x[:, 0] for x in attended)
    return out, lse
