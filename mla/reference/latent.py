"""Absorbed attention over the latent pages: in fixed shapes, or in groups of requests of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from mla.cache.ragged_batch import host_ints
from mla.reference.decode import DecodeState, fixed_shapes
from mla.reference.softmax import KEYS_BYTES, LOGITS_BYTES, attend, queries_per_call
from mla_backends.api import OPS, AttentionSpec, BatchView, FusedOp
from mla_backends.upload import upload

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


class _LatentState(NamedTuple):
    groups: tuple[_Group, ...]
    empty: tuple[slice, ...]  # tokens that see no key: rows a graph pads its batch with


class LatentAttention(FusedOp):
    """Absorbed attention: all heads are queries of one key/value head, the latent row itself."""

    contract = OPS["latent_attention"]
    nan_safe_tail = True
    lse_optional = True

    def prepare(self, spec: AttentionSpec, batch: BatchView) -> _LatentState | DecodeState:
        return fixed_shapes(spec, batch) or self._grouped(spec, batch)

    def _grouped(self, spec: AttentionSpec, batch: BatchView) -> _LatentState:
        rows = sorted(_cut(batch, spec.num_heads))
        width = spec.kv_lora_rank + spec.qk_rope_head_dim
        groups = list(_gather_rows([row for row in rows if row.keys > 0], spec.num_heads, width))
        empty = [slice(row.first_query, row.first_query + row.queries) for row in rows if row.keys <= 0]
        return _LatentState(tuple(_groups(groups, batch)), tuple(empty))

    def __call__(
        self, state: _LatentState | DecodeState, *,
        q: torch.Tensor, cache: torch.Tensor,  # [T, h, c + r], [pages, page, c + r]
        block_table: torch.Tensor, kv_lens: torch.Tensor, cu_q: torch.Tensor,
        softmax_scale: float, out: torch.Tensor, lse: torch.Tensor | None,  # out [T, h, c], lse [T, h] fp32
    ) -> None:  # fmt: skip
        if isinstance(state, DecodeState):
            state.attend(q, cache, block_table, kv_lens, softmax_scale, out, lse)
            return
        for group in state.groups:
            _attend_group(group, q, _keys(group, cache), softmax_scale, out, lse)
        for tokens in state.empty:
            out[tokens] = 0
            if lse is not None:
                lse[tokens] = -torch.inf


def _keys(group: _Group, cache: torch.Tensor) -> torch.Tensor:
    """Gather a group's latents [rows, keys, c + r] in fp32; what a row does not own becomes zero."""
    rows = cache.index_select(0, group.pages).view(group.rows, -1, cache.shape[-1])
    keys = rows[:, : group.keys].float()
    return keys if group.padding is None else keys.masked_fill_(group.padding, 0)


def _attend_group(
    group: _Group,
    q: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Attend one group over its keys [rows, keys, c + r]. Heads fold into the query dimension."""
    heads, width, latent = q.shape[1], q.shape[2], out.shape[2]
    hidden = group.hidden
    if hidden is not None:
        hidden = hidden.repeat_interleave(heads, dim=1, output_size=group.queries * heads)
    folded = q[group.tokens].reshape(-1, group.queries * heads, width)
    value, lse_rows = attend(folded, keys, keys[..., :latent], scale, hidden, with_lse=lse is not None)
    _put(out, group.tokens, value.view(-1, heads, latent))
    if lse is not None and lse_rows is not None:
        _put(lse, group.tokens, lse_rows.view(-1, heads))


def _put(target: torch.Tensor, tokens: slice | torch.Tensor, rows: torch.Tensor) -> None:
    """Write a group's rows to their places in `target` [T, ...]."""
    if isinstance(tokens, slice):
        target[tokens] = rows
    else:
        target.index_copy_(0, tokens, rows.to(target.dtype))


def _cut(batch: BatchView, heads: int) -> Iterator[_Row]:
    """Cut each request's queries into runs whose logits fit the cap."""
    if batch.query_lens.count(1) == len(batch.query_lens):  # decode: nothing to cut
        requests = range(len(batch.kv_lens))
        yield from map(_Row._make, zip(batch.query_lens, batch.kv_lens, requests, requests, strict=True))
        return
    start = 0
    for request, (query_len, kv_len) in enumerate(zip(batch.query_lens, batch.kv_lens, strict=True)):
        step = queries_per_call(heads, kv_len)
        for offset in range(0, query_len, step):
            count = min(step, query_len - offset)
            yield _Row(count, kv_len - query_len + offset + count, request, start + offset)
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


def _groups(groups: Sequence[Sequence[_Row]], batch: BatchView) -> Iterator[_Group]:
    """Resolve groups; tables go to the device only if a group needs more than a slice of the batch's own."""
    uniform = [_is_uniform(members) for members in groups]
    if all(uniform):
        yield from (_uniform_group(members, batch) for members in groups)
        return
    index = _index(groups, batch.block_table.device)
    parts = index.split([len(members) for members in groups])
    for plain, members, part in zip(uniform, groups, parts, strict=True):
        yield _uniform_group(members, batch) if plain else _group(members, part, batch)


def _is_uniform(members: Sequence[_Row]) -> bool:
    """Return whether the rows are single queries of adjacent requests with the same number of keys."""
    first, last = members[0], members[-1]
    return (
        first.queries == 1
        and first.keys == last.keys  # they are sorted by keys, and then by request
        and last.request - first.request == len(members) - 1 == last.first_query - first.first_query
    )


def _uniform_group(members: Sequence[_Row], batch: BatchView) -> _Group:
    """Resolve rows that need neither padding nor a mask nor tables of their own."""
    first, count = members[0], len(members)
    table = batch.block_table[first.request : first.request + count, : -(-first.keys // batch.page_size)]
    tokens = slice(first.first_query, first.first_query + count)
    return _Group(count, 1, first.keys, tokens, table.reshape(-1), None, None)


def _index(groups: Sequence[Sequence[_Row]], device: torch.device) -> torch.Tensor:
    """Return [rows, 3] int64 on the device: request, owned keys, first query; one copy for all groups."""
    values = [
        value for members in groups for row in members for value in (row.request, row.keys, row.first_query)
    ]
    return upload(host_ints(values).view(-1, 3), device)


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
