"""`ShardedBatch`: one step on one rank's tokens: what it writes, and what each new token attends here.

Attention ops take requests of new tokens of which each sees one key more than the one before. On one of W
ranks that holds for every W-th new token of a request, as each sees one more of this rank's tokens than the
last such one: so a request with several new tokens becomes up to W, and queries are reordered. With runs
of several tokens it does not hold, and every new token is a request of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol, TypeVar, cast

import torch

from mla.cache.ragged_batch import host_ints
from mla.errors import StaleBatch
from mla.parallel.share import Share
from mla_backends.upload import upload_into

Value = TypeVar("Value")


class Source(Protocol):
    """The cache that a batch describes."""

    share: Share

    @property
    def page_size(self) -> int: ...
    @property
    def num_pages(self) -> int: ...
    @property
    def generation(self) -> int: ...


class ShardedMemory:
    """The int32 device buffer of a step of so many new tokens, and views of its parts.

    A step of as many tokens may own fewer of them, or ask for fewer requests: it takes the first ones.
    """

    def __init__(self, tokens: int, width: int, device: torch.device) -> None:
        sizes = (2 * tokens,) * 4 + (tokens, tokens, tokens + 1, tokens * width)
        with torch.inference_mode(False):
            self.buffer = torch.empty(sum(sizes), dtype=torch.int32, device=device)
        *wide, self.positions, self.kv_lens, self.cu_q, table = self.buffer.split(sizes)
        self.own, self.slots, self.order, self.back = (part.view(torch.int64) for part in wide)
        self.block_table = table.view(tokens, width)
        self._kept: dict[Hashable, Any] = {}

    def fits(self, tokens: int, width: int) -> bool:
        """Return whether a step of so many tokens and pages per request fits here."""
        return self.block_table.shape == (tokens, width)

    def keep(self, key: Hashable, build: Callable[[], Value]) -> Value:
        """Return memory for data derived from a batch, made once per key; every batch overwrites it."""
        if key not in self._kept:
            with torch.inference_mode(False):
                self._kept[key] = build()
        return cast("Value", self._kept[key])

    def fill(self, parts: Sequence[torch.Tensor]) -> None:
        """Copy the parts of a batch, each to the beginning of its place, in one copy."""
        host = torch.zeros(self.buffer.shape[0], dtype=torch.int32)
        places = (self.own, self.slots, self.order, self.back, self.positions, self.kv_lens, self.cu_q)
        start = 0
        for part, place in zip(parts, (*places, self.block_table), strict=True):
            numbers = part.contiguous().view(-1).view(torch.int32)
            host[start : start + numbers.numel()] = numbers
            start += place.numel() * place.element_size() // 4
        upload_into(host, self.buffer)


@dataclass
class Rows:
    """The requests that attention is asked for on this rank: a `mla_backends.api.BatchView`."""

    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    page_size: int
    block_table: torch.Tensor  # [R, n] int32
    kv_lens_device: torch.Tensor  # [R] int32
    cu_q: torch.Tensor  # [R + 1] int32


class ShardedBatch:
    """One step of B requests with T new tokens in all, on one rank.

    `query_lens` and `kv_lens` are those of whole requests, `positions` [T] int32 those of all new tokens.
    `own` [t] int64 are this rank's among them, `slots` [t] int64 the rows of its cache they are written to.
    `rows` is what it attends, with queries in the order `order` [T] int64, and `back` [T] the way back; both
    are None where queries stay in order.
    """

    def __init__(
        self,
        source: Source,
        query_lens: Sequence[int],
        kv_lens: Sequence[int],
        block_table: torch.Tensor,  # [B, n] int32, on the host
        memory: ShardedMemory,
    ) -> None:
        self.query_lens, self.kv_lens = tuple(query_lens), tuple(kv_lens)
        self.num_tokens = sum(query_lens)
        self.page_size, self.memory = source.page_size, memory
        self._source, self._generation = source, source.generation
        self._memo: dict[Hashable, Any] = {}
        share = source.share
        request, positions = _new_tokens(self.query_lens, self.kv_lens)
        own = share.owned(positions).nonzero().view(-1)
        index = share.count(positions[own])
        page = block_table[request[own], index // self.page_size].long()
        order = _order(share, request, positions, self.query_lens)
        rows, cu_q, lengths = _cut(request[order], share.count(positions + 1)[order])
        slots = page * self.page_size + index % self.page_size
        wide = (own, slots, order, order.argsort())
        memory.fill((*wide, positions.int(), lengths.int(), cu_q.int(), block_table[rows]))
        self.own, self.slots = memory.own[: len(own)], memory.slots[: len(own)]
        self.positions = memory.positions
        same = bool((order[1:] > order[:-1]).all())
        self.order: torch.Tensor | None = None if same else memory.order
        self.back: torch.Tensor | None = None if same else memory.back
        count = len(rows)
        self.rows = Rows(
            tuple(cu_q.diff().tolist()),
            tuple(lengths.tolist()),
            self.page_size,
            memory.block_table[:count],
            memory.kv_lens[:count],
            memory.cu_q[: count + 1],
        )

    def memo(self, key: Hashable, build: Callable[[], Value]) -> Value:
        """Return what `build` made for `key`, building it at most once per batch."""
        if key not in self._memo:
            self._memo[key] = build()
        return cast("Value", self._memo[key])

    def fits(self, pages: int) -> bool:
        """Return whether a cache of `pages` pages can be the one this batch describes."""
        return self._source.num_pages == pages

    def check_current(self) -> None:
        """Raise `StaleBatch` when the cache has changed since this batch was made."""
        if self._source.generation != self._generation:
            raise StaleBatch(
                "this batch is out of date: the cache was extended, truncated or released since."
            )


def _new_tokens(query_lens: Sequence[int], kv_lens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the request [T] and the position [T] of every new token."""
    queries = host_ints(query_lens)
    request = torch.arange(len(query_lens)).repeat_interleave(queries)
    ends = host_ints(accumulate(query_lens))
    return request, torch.arange(sum(query_lens)) + (host_ints(kv_lens) - ends)[request]


def _order(
    share: Share, request: torch.Tensor, positions: torch.Tensor, query_lens: Sequence[int]
) -> torch.Tensor:
    """Return new tokens [T] so that those of a request of which each sees one key more are adjacent."""
    if share.interleave > 1 or max(query_lens, default=0) <= 1:
        return torch.arange(len(positions))
    return (request * share.world + positions.remainder(share.world)).argsort(stable=True)


def _cut(request: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut tokens, which see `seen` [T] keys, into rows of attention.

    Returns the request [R], cu_q [R + 1] and the number of keys [R] of each. Tokens without keys stand alone:
    the tokens of a request that has any all see some.
    """
    joined = (request[1:] == request[:-1]) & (seen[1:] == seen[:-1] + 1) & (seen[:-1] > 0)
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), (~joined).nonzero().view(-1) + 1))
    starts = starts[: len(request)]  # of no tokens there are no rows
    cu_q = torch.cat((starts, torch.tensor([len(request)])))
    return request[starts], cu_q, seen[cu_q[1:] - 1]
