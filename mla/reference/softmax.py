"""Softmax attention, written once for both paths."""

from __future__ import annotations

import torch

#: Bytes of fp32 logits one call may hold; longer work is cut into runs of queries.
LOGITS_BYTES = 16 << 20


def attend(
    q: torch.Tensor,  # [g, t, dk]
    k: torch.Tensor,  # [g, s, dk]
    v: torch.Tensor,  # [g, s, dv]
    scale: float,
    hidden: torch.Tensor | None,  # bool, broadcast to [g, t, s]: key s is not visible to query t
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return softmax(scale q k^T) v [g, t, dv] and its natural log-sum-exp [g, t, 1], both fp32.

    A query that sees no key gets 0 and -inf.
    """
    if k.shape[1] == 0:
        nothing = q.new_zeros((*q.shape[:2], v.shape[2]), dtype=torch.float32)
        return nothing, torch.full_like(nothing[..., :1], -torch.inf)
    weights = torch.bmm(q.float(), k.float().transpose(1, 2)).mul_(scale)
    if hidden is not None:
        weights.masked_fill_(hidden, -torch.inf)
    top = weights.amax(-1, keepdim=True).clamp_min_(torch.finfo(weights.dtype).min)  # -inf - -inf is NaN
    total = weights.sub_(top).exp_().sum(-1, keepdim=True)
    value = torch.bmm(weights, v.float()).div_(total.clamp_min(torch.finfo(weights.dtype).tiny))
    return value, total.log_().add_(top)


def queries_per_call(heads: int, keys: int) -> int:
    """Return how many queries of one request may be attended at once under the cap on logits."""
    return max(1, LOGITS_BYTES // (4 * heads * max(1, keys)))
