"""Softmax attention, written once for both paths."""

from __future__ import annotations

import torch

# Bytes of fp32 logits one call may hold.
LOGITS_BYTES = 256 << 20
# Bytes of gathered keys, in the cache's dtype and in fp32, that one call may hold.
KEYS_BYTES = 256 << 20
# Logits of this size stay in the host's cache, and short runs of queries skip more of the masked keys ...
TILE_BYTES = 2 << 20
# ... but runs of fewer queries would make too many small products.
MIN_QUERIES = 64


def attend(
    q: torch.Tensor,  # [g, t, dk]
    k: torch.Tensor,  # [g, s, dk]
    v: torch.Tensor,  # [g, s, dv]
    scale: float,
    hidden: torch.Tensor | None,  # bool, broadcast to [g, t, m]: which of the last m keys a query may not see
    with_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return softmax(scale q k^T) v [g, t, dv] and its natural log-sum-exp [g, t, 1] or None, both fp32.

    A query that sees no key gets 0 and -inf.
    """
    if k.shape[1] == 0:
        nothing = q.new_zeros((*q.shape[:2], v.shape[2]), dtype=torch.float32)
        return nothing, torch.full_like(nothing[..., :1], -torch.inf)
    weights = torch.bmm(q.float() * scale, k.float().transpose(1, 2))
    if hidden is not None:
        weights[..., weights.shape[-1] - hidden.shape[-1] :].masked_fill_(hidden, -torch.inf)
    top = weights.amax(-1, keepdim=True).clamp_min_(torch.finfo(weights.dtype).min)  # -inf - -inf is NaN
    total = weights.sub_(top).exp_().sum(-1, keepdim=True)
    value = torch.bmm(weights, v.float()).div_(total.clamp_min(torch.finfo(weights.dtype).tiny))
    return value, total.log_().add_(top) if with_lse else None


def queries_per_call(heads: int, keys: int) -> int:
    """Return how many queries of one request are attended at once."""
    per_query = 4 * heads * max(1, keys)
    return max(1, min(LOGITS_BYTES // per_query, max(MIN_QUERIES, TILE_BYTES // per_query)))
