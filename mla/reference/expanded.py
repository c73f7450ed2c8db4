"""Ordinary multi-head attention, one ragged segment after another."""

from __future__ import annotations

import torch

from mla.reference.softmax import attend, queries_per_call
from mla_backends.api import OPS, AttentionSpec, FusedOp, SegmentLengths


class ExpandedAttention(FusedOp):
    """Ordinary multi-head attention, one ragged segment after another."""

    contract = OPS["expanded_attention"]

    def prepare(self, spec: AttentionSpec, batch: SegmentLengths) -> SegmentLengths:
        return batch

    def __call__(
        self, state: SegmentLengths, *,
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,  # [Tq, h, n + r], [Tk, h, n + r], [Tk, h, v]
        softmax_scale: float, out: torch.Tensor, lse: torch.Tensor,  # out [Tq, h, v], lse [Tq, h] fp32
    ) -> None:  # fmt: skip
        by_query = (tensor.split(state.query_lens) for tensor in (q, out, lse))
        by_key = (tensor.split(state.kv_lens) for tensor in (k, v))
        for parts in zip(*by_query, *by_key, strict=True):
            _attend_segment(parts, softmax_scale, state.causal)


def _attend_segment(parts: tuple[torch.Tensor, ...], scale: float, causal: bool) -> None:
    """Attend one segment, cutting its queries so that the logits fit the cap."""
    q, out, lse, k, v = parts
    heads, (queries, keys) = q.shape[1], (q.shape[0], k.shape[0])
    k, v = (tensor.transpose(0, 1).float() for tensor in (k, v))  # [h, s, d]
    step = queries_per_call(heads, keys)
    for start in range(0, queries, step):
        run = slice(start, min(start + step, queries))
        seen = max(0, keys - queries + run.stop) if causal else keys
        hidden = None
        if causal and run.stop - run.start > 1:
            last = torch.arange(run.start, run.stop, device=q.device) + (keys - queries)
            first_hidden = max(0, seen - (run.stop - run.start) + 1)  # every query sees all keys before it
            hidden = torch.arange(first_hidden, seen, device=q.device) > last[:, None]
        value, row_lse = attend(q[run].transpose(0, 1), k[:, :seen], v[:, :seen], scale, hidden)
        out[run] = value.transpose(0, 1)
        lse[run] = row_lse[..., 0].transpose(0, 1)
