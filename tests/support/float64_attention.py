"""Attention in float64, query by query: the truth that tests of attention ops compare with.

There are two on purpose, written independently of each other. The other one, `mla.verify.op_oracle`, judges
ops in the product and masks all queries at once. Here every query gets the slice of keys that it sees.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

Outputs = tuple[torch.Tensor, torch.Tensor]
Segment = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool = True) -> Outputs:
    """Attend q [t, h, dk] over k [s, h, dk] and v [s, h, dv], or k [s, dk] and v [s, dv] for all heads.

    Return out [t, h, dv] and the natural log-sum-exp [t, h], both float64. When causal, the last query sees
    the last key. A query that sees no key gives 0 and -inf.
    """
    heads = "s" if k.dim() == 2 else "sh"
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=torch.float64)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64)
    for i, query in enumerate(q):
        seen = len(k) - len(q) + i + 1 if causal else len(k)
        if seen > 0:
            logits = torch.einsum(f"hd,{heads}d->hs", query, k[:seen]) * scale
            lse[i] = logits.logsumexp(-1)
            out[i] = torch.einsum(f"hs,{heads}d->hd", logits.softmax(-1), v[:seen])
    return out, lse


def attend_segments(segments: Iterable[Segment], scale: float, causal: bool = True) -> Outputs:
    """Attend every (q, k, v) by itself, and return the rows of out and lse one after the other."""
    outs, lses = zip(*(attend(q, k, v, scale, causal) for q, k, v in segments), strict=True)
    return torch.cat(outs), torch.cat(lses)
