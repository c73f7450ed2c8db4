"""Absorbed attention of a decode step in fixed shapes: few launches, which follow lengths on the device.

Every request is padded to the width of the block table, and masked by its length. A step of other lengths is
then the same launches, so that a graph can capture them. This reads more keys than the requests own: a device
that is short of launches gains by it, the CPU would lose.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mla.reference.softmax import KEYS_BYTES, LOGITS_BYTES
from mla_backends.api import AttentionSpec, BatchView
from mla_backends.torch_backend.graph import capturing

# New tokens per request: a decode step, with some drafted tokens.
MOST_QUERIES = 8
# Padded keys are at most this many times the keys that requests own ...
WASTE = 4
# ... unless they take no more than these bytes, which costs less than a few launches.
FREE_BYTES = 16 << 20
# Bytes of the masks of a whole batch, which live as long as its plan.
MASKS_BYTES = 128 << 20


class _Masks(NamedTuple):
    """What is hidden in one part, by the lengths of its requests."""

    foreign: torch.Tensor  # [b, keys, 1] bool: slots that a request does not own
    bias: torch.Tensor  # [b, queries, keys] fp32: -inf for keys that a query may not see, else 0


@dataclass(frozen=True, eq=False)
class DecodeState:
    """A batch whose requests have equally many new tokens."""

    parts: tuple[slice, ...]  # of the requests: what is attended at once
    keys: int  # per request, padded
    queries: int  # new tokens per request
    masks: tuple[_Masks, ...]  # one per part
    captured: bool  # a graph makes these masks anew whenever it is replayed
    graph_safe = True

    def attend(
        self,
        q: torch.Tensor,  # [T, h, c + r]
        cache: torch.Tensor,  # [pages, page, c + r]
        block_table: torch.Tensor,  # [B, n] int32
        kv_lens: torch.Tensor,  # [B] int32
        scale: float,
        out: torch.Tensor,  # [T, h, c]
        lse: torch.Tensor | None,  # [T, h] fp32
    ) -> None:
        """Attend all requests. In a capture, lengths are read on the device, as a replay finds them."""
        masks: Iterable[_Masks] = self.masks
        if not self.captured and capturing(q.device):  # one part at a time
            masks = (_masks(kv_lens[part], self.keys, self.queries) for part in self.parts)
        for part, masked in zip(self.parts, masks, strict=True):
            tokens = slice(part.start * self.queries, part.stop * self.queries)
            value, sums = out[tokens], None if lse is None else lse[tokens]
            # No name here for the keys: they would live on while those of the next part are gathered.
            self._attend(
                q[tokens],
                self._keys(cache, block_table[part], masked),
                kv_lens[part],
                masked,
                scale,
                value,
                sums,
            )

    def _keys(self, cache: torch.Tensor, table: torch.Tensor, masks: _Masks) -> torch.Tensor:
        """Gather the latents [b, keys, c + r] in fp32; what a request does not own becomes zero."""
        rows = cache.index_select(0, table.reshape(-1)).view(table.shape[0], self.keys, cache.shape[2])
        return rows.float().masked_fill_(masks.foreign, 0)

    def _attend(
        self,
        q: torch.Tensor,  # [b * queries, h, c + r]
        keys: torch.Tensor,  # [b, keys, c + r] fp32
        kv_lens: torch.Tensor,  # [b]
        masks: _Masks,
        scale: float,
        out: torch.Tensor,  # [b * queries, h, c]
        lse: torch.Tensor | None,  # [b * queries, h]
    ) -> None:
        """Attend one part."""
        requests, heads = keys.shape[0], q.shape[1]
        wide = q.to(torch.float32, memory_format=torch.contiguous_format)
        newest = masks.bias[:, -1:]  # what the newest token may not see, no other may
        folded = wide.view(requests, -1, q.shape[2])
        logits = torch.baddbmm(newest, folded, keys.transpose(1, 2), alpha=scale)
        if self.queries > 1:
            logits.view(requests, self.queries, heads, -1).add_(masks.bias[:, :, None])
        out.copy_(torch.bmm(logits.softmax(-1), keys[..., : out.shape[2]]).view(out.shape))
        if lse is not None:
            sums = logits.logsumexp(-1).masked_fill_((kv_lens == 0)[:, None], -torch.inf)
            lse.copy_(sums.view(lse.shape))


def _masks(kv_lens: torch.Tensor, keys: int, queries: int) -> _Masks:
    """Return the masks of requests with these lengths [b].

    A request without keys sees its first slot, which is zero: its output is then exactly 0.
    """
    place = torch.arange(keys, dtype=kv_lens.dtype, device=kv_lens.device)
    owned = kv_lens[:, None]
    newest = owned - 1
    if queries > 1:
        newest = newest + torch.arange(1 - queries, 1, dtype=owned.dtype, device=owned.device)
    hidden = place > newest.clamp_(min=0)[..., None]
    bias = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    bias.masked_fill_(hidden, -torch.inf)
    return _Masks((place >= owned)[..., None], bias)


def fixed_shapes(spec: AttentionSpec, batch: BatchView) -> DecodeState | None:
    """Return the state of a decode step on a device; None where grouping by length is better."""
    if spec.device.type == "cpu" or not _is_decode(batch):
        return None
    queries, requests = batch.query_lens[0], len(batch.kv_lens)
    keys = batch.block_table.shape[1] * batch.page_size
    key_bytes = 8 * (spec.kv_lora_rank + spec.qk_rope_head_dim)  # as they are cached, and in fp32
    logit_bytes = 8 * spec.num_heads * queries * keys  # of one request, and as weights
    padded = requests * keys
    wasteful = padded > WASTE * sum(batch.kv_lens) and padded * key_bytes > FREE_BYTES
    mask_bytes = padded * (4 * queries + 1)
    if wasteful or logit_bytes > LOGITS_BYTES or mask_bytes > MASKS_BYTES:
        return None
    together = max(1, min(KEYS_BYTES // (key_bytes * keys), LOGITS_BYTES // logit_bytes))
    parts = tuple(_parts(requests, together))
    masks = tuple(_masks(batch.kv_lens_device[part], keys, queries) for part in parts)
    return DecodeState(parts, keys, queries, masks, capturing(spec.device))


def _is_decode(batch: BatchView) -> bool:
    """Return whether each request has the same few new tokens, and each of them a key unless none has"""
    count = batch.query_lens[0] if batch.query_lens else 0
    return (
        1 <= count <= MOST_QUERIES
        and batch.query_lens.count(count) == len(batch.query_lens)
        and all(keys == 0 or keys >= count for keys in batch.kv_lens)
    )


def _parts(requests: int, together: int) -> Iterator[slice]:
    for start in range(0, requests, together):
        yield slice(start, min(start + together, requests))
