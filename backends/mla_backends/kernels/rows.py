"""Cut a ragged batch into groups of rows with equally many queries, which is what a vendor's kernel takes.

A row is a run of one request's queries together with the keys that the last of them sees. Requests with
equally many new tokens share one launch, so a decode step is one launch and a mixed batch one per distinct
number of new tokens; no key is read more often than the kernel's own tiling requires.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import TYPE_CHECKING, NamedTuple

from mla_backends.api import BatchView
from mla_backends.upload import upload

if TYPE_CHECKING:
    import torch


class Row(NamedTuple):
    """Queries of one request, from token `first` on; the last sees `keys` keys, each before it one less."""

    request: int
    first: int
    queries: int
    keys: int


@dataclass(frozen=True)
class Group:
    """Rows that one launch serves."""

    rows: int
    queries: int  # per row
    tokens: slice | torch.Tensor  # of the batch, row after row; an index where they are not contiguous
    block_table: torch.Tensor  # [rows, n] int32
    kv_lens: torch.Tensor  # [rows] int32
    longest: int  # the most keys of a row
    has_empty: bool  # some row sees no key
    follows_batch: bool  # the tables are the batch's own, so a captured graph sees what they are updated to


def cut(batch: BatchView, most: int | None) -> Iterator[Row]:
    """Cut each request into rows of at most `most` queries (None: any)."""
    start = 0
    for request, (count, keys) in enumerate(zip(batch.query_lens, batch.kv_lens, strict=True)):
        blind = min(count, max(0, count - keys))  # queries before the request's first key
        yield from _cut(request, start, blind, 0, most)
        yield from _cut(request, start + blind, count - blind, keys, most)
        start += count


def _cut(request: int, first: int, count: int, keys: int, most: int | None) -> Iterator[Row]:
    step = most or max(1, count)
    for offset in range(0, count, step):
        queries = min(step, count - offset)
        unseen = count - offset - queries if keys else 0  # keys of the queries after this row
        yield Row(request, first + offset, queries, keys - unseen)


def groups(batch: BatchView, most: int | None) -> tuple[Group, ...]:
    """Group a batch's rows by their number of queries. Waits for nothing on the device."""
    rows = sorted(cut(batch, most), key=lambda row: row.queries)  # stable: contiguous tokens stay so
    if not rows:
        return ()  # no new tokens
    members = [list(found) for _, found in groupby(rows, key=lambda row: row.queries)]
    if len(members) == 1 and [row.request for row in rows] == list(range(len(batch.query_lens))):
        return (_whole(rows, batch),)
    columns = ((row.request for row in rows), (row.keys for row in rows), (row.first for row in rows))
    index = _upload(chain(*columns), batch.block_table).view(3, -1)
    parts = index.split([len(found) for found in members], dim=1)
    return tuple(_group(found, part, batch) for found, part in zip(members, parts, strict=True))


def _whole(rows: Sequence[Row], batch: BatchView) -> Group:
    """Return the group of rows that are the batch's requests, one by one."""
    tokens = slice(0, sum(row.queries for row in rows))
    return _describe(rows, tokens, batch.block_table, batch.kv_lens_device, True)


def _group(rows: Sequence[Row], index: torch.Tensor, batch: BatchView) -> Group:
    """Gather what a part of the batch needs; `index` [3, rows] int64 holds request, keys and first query."""
    import torch

    queries, first = rows[0].queries, rows[0].first
    tokens: slice | torch.Tensor = slice(first, first + queries * len(rows))
    if any(row.first != first + i * queries for i, row in enumerate(rows)):
        tokens = (index[2][:, None] + torch.arange(queries, device=index.device)).view(-1)
    table = batch.block_table.index_select(0, index[0])
    return _describe(rows, tokens, table, index[1].int(), False)


def _describe(
    rows: Sequence[Row],
    tokens: slice | torch.Tensor,
    table: torch.Tensor,
    kv_lens: torch.Tensor,
    follows: bool,
) -> Group:
    keys = [row.keys for row in rows]
    return Group(len(rows), rows[0].queries, tokens, table, kv_lens, max(keys), min(keys) == 0, follows)


def _upload(values: Iterable[int], like: torch.Tensor) -> torch.Tensor:
    """Copy host integers to the device of `like` as int64, in one asynchronous copy."""
    import torch

    buffer = array("q", values)
    host = (
        torch.frombuffer(buffer, dtype=torch.int64)
        if buffer
        else torch.empty(0, dtype=torch.int64, device="cpu")
    )
    return upload(host, like.device)
