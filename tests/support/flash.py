"""Attention as fast kernels do it: tiles of keys, and parts that are merged."""

from __future__ import annotations

from typing import Any

import torch

from mla_backends import FusedOp


class Flash(FusedOp):
    """A running maximum over tiles of keys; weights are rounded to the dtype before they meet the values."""

    def __init__(self, contract: str, tile: int, splits: int) -> None:
        self.contract, self.tile, self.splits = contract, tile, splits

    def prepare(self, spec: Any, batch: Any) -> Any:
        return batch

    def __call__(self, state: Any, *, q: Any, softmax_scale: float, out: Any, lse: Any, **rest: Any) -> None:
        first, rows = 0, 0
        for request, (new, length) in enumerate(zip(state.query_lens, state.kv_lens, strict=True)):
            here = slice(first, first + new)
            if "cache" in rest:
                pages = rest["block_table"][request, : -(-length // state.page_size)].long()
                k = rest["cache"][pages].flatten(0, 1)[:length, None].expand(-1, q.shape[1], -1)
                v = k[..., : out.shape[2]]
            else:
                k, v = (rest[name][rows : rows + length] for name in ("k", "v"))
            causal = getattr(state, "causal", True)
            self.attend(q[here], k, v, softmax_scale, causal, out[here], lse[here])
            first, rows = first + new, rows + length

    def attend(self, q: Any, k: Any, v: Any, scale: float, causal: bool, out: Any, lse: Any) -> None:
        """Attend one request: parts of its keys one by one, merged by their log-sum-exp."""
        last = torch.arange(len(q))[:, None] + (len(k) - len(q) if causal else len(k))
        edge = -(-max(1, len(k)) // self.splits)
        parts = [
            self.part(q, k, v, scale, last, range(start, min(start + edge, len(k))))
            for start in range(0, len(k), edge)
        ]
        if not parts or not len(q):
            out.zero_(), lse.fill_(-torch.inf)
            return
        values, sums = (torch.stack(part) for part in zip(*parts, strict=True))
        total = sums.logsumexp(0)
        share = (sums - total.clamp_min(-1e30)).exp()
        out.copy_((values * share[..., None]).sum(0))
        lse.copy_(total)

    def part(self, q: Any, k: Any, v: Any, scale: float, last: Any, keys: range) -> Any:
        """Return the output [t, h, d] and log-sum-exp [t, h] over a part of the keys."""
        top = torch.full(q.shape[:2], -1e30)
        total, value = torch.zeros(q.shape[:2]), torch.zeros(*q.shape[:2], v.shape[2])
        for start in range(keys.start, keys.stop, self.tile):
            tile = slice(start, min(start + self.tile, keys.stop))
            hidden = torch.arange(tile.start, tile.stop) > last
            logits = torch.einsum("thd,shd->ths", q.float(), k[tile].float()) * scale
            logits = logits.masked_fill(hidden[:, None], -torch.inf)
            now = torch.maximum(top, logits.amax(-1))
            weights, fade = (logits - now[..., None]).exp(), (top - now).exp()
            product = torch.einsum("ths,shd->thd", weights.to(v.dtype).float(), v[tile].float())
            top, total, value = now, total * fade + weights.sum(-1), value * fade[..., None] + product
        seen = total > 0
        return value / total.clamp_min(1e-30)[..., None], torch.where(seen, top + total.log(), -torch.inf)


class Normalised(Flash):
    """Divides weights by their sum before it rounds them."""

    def part(self, q: Any, k: Any, v: Any, scale: float, last: Any, keys: range) -> Any:
        part = slice(keys.start, keys.stop)
        logits = torch.einsum("thd,shd->ths", q.float(), k[part].float()) * scale
        logits = logits.masked_fill((torch.arange(keys.start, keys.stop) > last)[:, None], -torch.inf)
        lse = logits.logsumexp(-1)
        weights = (logits - lse.clamp_min(-1e30)[..., None]).exp()
        return torch.einsum("ths,shd->thd", weights.to(v.dtype).float(), v[part].float()), lse
