"""Attention in plain PyTorch, on either path."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mla.cache.formats import Codec, codec_of, latents
from mla.cache.ragged_batch import host_ints
from mla.reference.small import OfFormats
from mla_backends.api import OPS, AttentionSpec, BatchView, FusedOp, SegmentLengths
from mla_backends.torch_backend import capturing
from mla_backends.upload import upload

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


# ----------------------------------------------------------------------------------------- expanded
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
        first = first_key = 0
        for new, count in zip(state.query_lens, state.kv_lens, strict=True):
            segment = slice(first_key, first_key + count)
            keys, values = (x[segment].transpose(0, 1).float() for x in (k, v))  # [h, s, d]
            step = queries_per_call(q.shape[1], count)  # so that the logits fit the cap
            for start in range(0, new, step):
                stop, hidden = min(start + step, new), None
                seen = max(0, count - new + stop) if state.causal else count
                if state.causal and stop - start > 1:
                    last = torch.arange(start, stop, device=q.device) + (count - new)
                    first_hidden = max(0, seen - (stop - start) + 1)  # every query sees all keys before it
                    hidden = torch.arange(first_hidden, seen, device=q.device) > last[:, None]
                run = slice(first + start, first + stop)
                parts = (q[run].transpose(0, 1), keys[:, :seen], values[:, :seen])
                value, sums = attend(*parts, softmax_scale, hidden, with_lse=lse is not None)
                out[run] = value.transpose(0, 1)
                if lse is not None and sums is not None:
                    lse[run] = sums[..., 0].transpose(0, 1)
                del parts
            first, first_key = first + new, first_key + count
            del keys, values  # before those of the next segment are made


# ------------------------------------------------------------------------------------------- latent
# Absorbed attention over the latent pages: in fixed shapes, or in groups of requests of similar length.

# A request joins a group of shorter ones while that pads the shorter by at most this factor.
PADDING = 1.25


class _Row(NamedTuple):
    """A run of queries of one request, and the keys the last of them sees. Rows sort by their sizes."""

    queries: int
    keys: int
    request: int
    first_query: int  # index into the tokens of the batch


class _Group(NamedTuple):
    """Rows of equal query count that are attended together."""

    rows: int
    queries: int
    keys: int  # padded
    tokens: slice | torch.Tensor  # the queries, row after row
    pages: torch.Tensor  # [rows * pages] int32: the pages of each row's first `keys` tokens
    padding: torch.Tensor | None  # [rows, keys, 1] bool: slots a row does not own; None: it owns all
    hidden: torch.Tensor | None  # [rows, queries, m] bool: which of the last m keys a query may not see


class LatentAttention(OfFormats):
    """Absorbed attention: all heads are queries of one key/value head, the latent row itself."""

    contract = OPS["latent_attention"]
    nan_safe_tail = True
    lse_optional = True

    def prepare(self, spec: AttentionSpec, batch: BatchView) -> tuple[_Group, ...] | DecodeState:
        return fixed_shapes(spec, batch) or _grouped(spec, batch)

    def __call__(
        self, state: tuple[_Group, ...] | DecodeState, *,
        q: torch.Tensor, cache: torch.Tensor,  # [T, h, c + r], [pages, page, c + r] or bytes
        block_table: torch.Tensor, kv_lens: torch.Tensor, cu_q: torch.Tensor,
        softmax_scale: float, out: torch.Tensor, lse: torch.Tensor | None,  # out [T, h, c], lse [T, h] fp32
        cache_format: str = "",
    ) -> None:  # fmt: skip
        heads, width, latent = q.shape[1], q.shape[2], out.shape[2]
        codec = codec_of(cache_format, latent, width - latent)
        if isinstance(state, DecodeState):
            state.attend(q, cache, block_table, kv_lens, softmax_scale, out, lse, codec)
            return
        for group in state:
            slots = group.rows, len(group.pages) // group.rows * cache.shape[1], cache.shape[2]
            keys = latents(cache.index_select(0, group.pages).view(slots)[:, : group.keys], codec)
            if group.padding is not None:  # what a row does not own
                keys.masked_fill_(group.padding, 0)
            hidden = group.hidden
            if hidden is not None:
                hidden = hidden.repeat_interleave(heads, dim=1, output_size=group.queries * heads)
            folded = q[group.tokens].reshape(group.rows, group.queries * heads, width)
            parts = folded, keys, keys[..., :latent], softmax_scale, hidden
            value, sums = attend(*parts, with_lse=lse is not None)
            _put(out, group.tokens, value.view(-1, heads, latent))
            if lse is not None and sums is not None:
                _put(lse, group.tokens, sums.view(-1, heads))
            del keys, parts  # before the next ones are gathered


def _put(target: torch.Tensor, tokens: slice | torch.Tensor, rows: torch.Tensor) -> None:
    """Write a group's rows to their places in `target` [T, ...]."""
    if isinstance(tokens, slice):
        target[tokens] = rows
    else:
        target.index_copy_(0, tokens, rows.to(target.dtype))


def _cut(batch: BatchView, heads: int) -> Iterator[_Row]:
    """Cut each request's queries into runs whose logits fit the cap."""
    start = 0
    for request, (query_len, kv_len) in enumerate(zip(batch.query_lens, batch.kv_lens, strict=True)):
        step = queries_per_call(heads, kv_len)
        for offset in range(0, query_len, step):
            count = min(step, query_len - offset)
            keys = max(0, kv_len - query_len + offset + count)
            yield _Row(count, keys, request, start + offset)
        start += query_len


def _gather_rows(rows: Sequence[_Row], heads: int, width: int) -> Iterator[list[_Row]]:
    """Group sorted rows of equal query count and similar key count, within the memory caps."""
    members: list[_Row] = []
    for row in rows:
        keys = row.keys * (len(members) + 1)
        logits = 4 * heads * row.queries * keys
        if members and (
            row.queries != members[0].queries
            or row.keys > PADDING * members[0].keys
            or logits > LOGITS_BYTES
            or 8 * width * keys > KEYS_BYTES
        ):
            yield members
            members = []
        members.append(row)
    if members:
        yield members


def _grouped(spec: AttentionSpec, batch: BatchView) -> tuple[_Group, ...]:
    """Resolve groups; one copy takes [rows, 3] int64 to the device: request, owned keys, first query."""
    width = spec.kv_lora_rank + spec.qk_rope_head_dim
    groups = list(_gather_rows(sorted(_cut(batch, spec.num_heads)), spec.num_heads, width))
    values = [
        value for members in groups for row in members for value in (row.request, row.keys, row.first_query)
    ]
    index = upload(host_ints(values).view(-1, 3), batch.block_table.device)
    parts = index.split([len(members) for members in groups])
    return tuple(_group(members, part, batch) for members, part in zip(groups, parts, strict=True))


def _group(members: Sequence[_Row], index: torch.Tensor, batch: BatchView) -> _Group:
    """Resolve where a group's queries are, which pages hold its keys and which keys each query sees."""
    queries, keys, device = members[0].queries, members[-1].keys, index.device
    start = members[0].first_query
    tokens: slice | torch.Tensor = slice(start, start + queries * len(members))
    if [row.first_query for row in members] != list(range(start, start + queries * len(members), queries)):
        tokens = (index[:, 2:] + torch.arange(queries, device=device)).view(-1)
    pages = batch.block_table[:, : -(-keys // batch.page_size)].index_select(0, index[:, 0])
    shortest, owned = members[0].keys, index[:, 1:2]
    padding = hidden = None
    if shortest != keys:
        padding = (torch.arange(keys, device=device) >= owned)[..., None]
    seen_by_all = max(0, shortest - queries + 1)
    if seen_by_all < keys:
        last_key = owned - queries + torch.arange(queries, device=device)
        hidden = torch.arange(seen_by_all, keys, device=device) > last_key[..., None]
    return _Group(len(members), queries, keys, tokens, pages.view(-1), padding, hidden)


# ------------------------------------------------------------------------------------------- decode
# Absorbed attention of a decode step in fixed shapes: few launches, which follow lengths on the device.
#
# Every request is padded to the width of the block table, and masked by its length. A step of other lengths
# is then the same launches, so that a graph can capture them. This reads more keys than the requests own: a
# device that is short of launches gains by it, the CPU would lose.

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
        codec: Codec | None = None,
    ) -> None:
        """Attend all requests. In a capture, lengths are read on the device, as a replay finds them."""
        masks: Iterable[_Masks] = self.masks
        heads = q.shape[1]
        if not self.captured and capturing(q.device):  # one part at a time
            masks = (_masks(kv_lens[part], self.keys, self.queries) for part in self.parts)
        for part, masked in zip(self.parts, masks, strict=True):
            tokens = slice(part.start * self.queries, part.stop * self.queries)
            table = block_table[part]
            # No name for the keys as cached: these would live on while those in fp32 are used.
            rows = table.shape[0], self.keys, cache.shape[2]
            keys = latents(cache.index_select(0, table.reshape(-1)).view(rows), codec)
            keys.masked_fill_(masked.foreign, 0)  # what a request does not own
            wide = q[tokens].to(torch.float32, memory_format=torch.contiguous_format)
            newest = masked.bias[:, -1:]  # what the newest token may not see, no other may
            folded = wide.view(len(keys), -1, q.shape[2])
            logits = torch.baddbmm(newest, folded, keys.transpose(1, 2), alpha=scale)
            if self.queries > 1:
                logits.view(len(keys), self.queries, heads, -1).add_(masked.bias[:, :, None])
            value = out[tokens]
            value.copy_(torch.bmm(logits.softmax(-1), keys[..., : out.shape[2]]).view(value.shape))
            if lse is not None:
                sums = logits.logsumexp(-1).masked_fill_((kv_lens[part] == 0)[:, None], -torch.inf)
                lse[tokens].copy_(sums.view(-1, heads))
            del keys, logits  # before those of the next part are made


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
    if spec.device.type == "cpu" or not is_decode(batch):
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
    parts = tuple(slice(at, min(at + together, requests)) for at in range(0, requests, together))
    masks = tuple(_masks(batch.kv_lens_device[part], keys, queries) for part in parts)
    return DecodeState(parts, keys, queries, masks, capturing(spec.device))


def is_decode(batch: BatchView) -> bool:
    """Return whether each request has the same few new tokens, and each of them a key unless none has"""
    count = batch.query_lens[0] if batch.query_lens else 0
    return (
        1 <= count <= MOST_QUERIES
        and batch.query_lens.count(count) == len(batch.query_lens)
        and all(keys == 0 or keys >= count for keys in batch.kv_lens)
    )
