"""`ShardedBatch`: one step on one rank's tokens: what it writes, and what each new token attends here.

Attention ops take requests of new tokens of which each sees one key more than the one before. On one of W
ranks that holds for every W-th new token of a request, as each sees one more of this rank's tokens than the
last such one: so a request with several new tokens becomes up to W, and queries are reordered. With runs
of several tokens it does not hold, and every new token is a request of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, Protocol, TypeVar, cast

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

    def __init__(self, tokens: int, rows: int, width: int, device: torch.device) -> None:
        """`rows`: the most requests that attention is asked for; `width`: pages of each."""
        sizes = (2 * tokens,) * 4 + (tokens, rows, rows + 1, rows * width)
        with torch.inference_mode(False):
            self.buffer = torch.empty(sum(sizes), dtype=torch.int32, device=device)
        *wide, self.positions, self.kv_lens, self.cu_q, table = self.buffer.split(sizes)
        self.own, self.slots, self.order, self.back = (part.view(torch.int64) for part in wide)
        self.block_table = table.view(rows, width)
        self._kept: dict[Hashable, Any] = {}

    def fits(self, tokens: int, rows: int, width: int) -> bool:
        """Return whether a step of so many tokens, rows of attention and pages of each fits here."""
        return self.positions.shape[0] == tokens and self.block_table.shape == (rows, width)

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


def most_rows(share: Share, query_lens: Sequence[int]) -> int:
    """Return the most rows of attention that a step is cut into.

    Of every request, each of `world` classes of tokens is a row, and its first token one more where it sees
    no key here. Runs of several tokens are cut token by token.
    """
    if share.interleave > 1:
        return sum(query_lens)
    return sum(min(new, 2 * share.world) for new in query_lens)


@dataclass
class Rows:
    """The requests that attention is asked for on this rank: a `mla_backends.api.BatchView`."""

    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    page_size: int
    block_table: torch.Tensor  # [R, n] int32
    kv_lens_device: torch.Tensor  # [R] int32
    cu_q: torch.Tensor  # [R + 1] int32


@dataclass
class Part:
    """Some new tokens of a step, and what they attend on this rank.

    Queries go to `rows` in the order `order` [t] int64, and `back` [t] is the way back; both are None where
    queries stay in order.
    """

    tokens: slice
    rows: Rows
    order: torch.Tensor | None
    back: torch.Tensor | None


class _Cut(NamedTuple):
    """A part on the host."""

    order: torch.Tensor  # [t]
    rows: torch.Tensor  # [R]: the request of each
    cu_q: torch.Tensor  # [R + 1]
    kv_lens: torch.Tensor  # [R]

    def ordered(self) -> bool:
        """Return whether queries stay in order."""
        return bool((self.order[1:] > self.order[:-1]).all())


class ShardedBatch:
    """One step of B requests with T new tokens in all, on one rank.

    `query_lens` and `kv_lens` are those of whole requests, `positions` [T] int32 those of all new tokens.
    `own` [t] int64 are this rank's among them, `slots` [t] int64 the rows of its cache they are written to.
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
        self._table = block_table
        self._request, self._positions = _new_tokens(self.query_lens, self.kv_lens)
        share, positions = source.share, self._positions
        self._seen = share.count(positions + 1)
        own = share.owned(positions).nonzero().view(-1)
        index = share.count(positions[own])
        page = block_table[self._request[own], index // self.page_size].long()
        slots = page * self.page_size + index % self.page_size
        cut = self._cut(slice(0, self.num_tokens))
        wide, whole = (own, slots, cut.order, cut.order.argsort()), (cut.kv_lens.int(), cut.cu_q.int())
        memory.fill((*wide, positions.int(), *whole, block_table[cut.rows]))
        self.own, self.slots = memory.own[: len(own)], memory.slots[: len(own)]
        self.positions = memory.positions
        self._whole = self._part(slice(0, self.num_tokens), cut, memory)

    def parts(self, most: int) -> tuple[Part, ...]:
        """Return the step's tokens in parts of at most `most`, which is positive; none without new tokens."""
        if self.num_tokens <= most:
            return (self._whole,) if self.num_tokens else ()
        return self.memo(("parts", most), lambda: tuple(self._split(most)))

    def _split(self, most: int) -> Iterator[Part]:
        device = self.positions.device
        for first in range(0, self.num_tokens, most):
            tokens = slice(first, min(first + most, self.num_tokens))
            cut = self._cut(tokens)
            count, width = tokens.stop - first, self._table.shape[1]
            memory = ShardedMemory(count, len(cut.rows), width, device)
            nothing = torch.empty(0, dtype=torch.int64)
            wide, lengths = (nothing, nothing, cut.order, cut.order.argsort()), (cut.kv_lens, cut.cu_q)
            memory.fill((*wide, nothing, *(one.int() for one in lengths), self._table[cut.rows]))
            yield self._part(tokens, cut, memory)

    def _cut(self, tokens: slice) -> _Cut:
        request, positions = self._request[tokens], self._positions[tokens]
        order = _order(self._source.share, request, positions, self.query_lens)
        return _Cut(order, *_cut(request[order], self._seen[tokens][order]))

    def _part(self, tokens: slice, cut: _Cut, memory: ShardedMemory) -> Part:
        """Return a part that `memory` holds."""
        count, same = len(cut.rows), cut.ordered()
        rows = Rows(
            tuple(cut.cu_q.diff().tolist()),
            tuple(cut.kv_lens.tolist()),
            self.page_size,
            memory.block_table[:count],
            memory.kv_lens[:count],
            memory.cu_q[: count + 1],
        )
        return Part(tokens, rows, None if same else memory.order, None if same else memory.back)

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
