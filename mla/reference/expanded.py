"""Ordinary multi-head attention, one ragged segment after another."""

from __future__ import annotations

import torch

from mla.reference.softmax import attend, queries_per_call
from mla_backends.api import OPS, AttentionSpec, FusedOp, SegmentLengths


class ExpandedAttention(FusedOp):
    """Ordinary multi-head attention, one ragged segment after another."""

    contract = OPS["expanded_attention"]
    lse_optional = True

    def prepare(self, spec: AttentionSpec, batch: SegmentLengths) -> SegmentLengths:
        return batch

    def __call__(
        self, state: SegmentLengths, *,
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,  # [Tq, h, n + r], [Tk, h, n + r], [Tk, h, v]
        softmax_scale: float, out: torch.Tensor, lse: torch.Tensor | None,  # out [Tq, h, v], lse [Tq, h] fp32
    ) -> None:  # fmt: skip
        queries, keys = state.query_lens, state.kv_lens
        sums = [None] * len(queries) if lse is None else lse.split(queries)
        segments = zip(q.split(queries), k.split(keys), v.split(keys), out.split(queries), sums, strict=True)
        for segment in segments:
            _attend_segment(*segment, softmax_scale, state.causal)


def _attend_segment(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    scale: float,
    causal: bool,
) -> None:
    """Attend one segment, cutting its queries so that the logits fit the cap."""
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
        parts = (q[run].transpose(0, 1), k[:, :seen], v[:, :seen])
        value, row_lse = attend(*parts, scale, hidden, with_lse=lse is not None)
        out[run] = value.transpose(0, 1)
        if lse is not None and row_lse is not None:
            lse[run] = row_lse[..., 0].transpose(0, 1)
