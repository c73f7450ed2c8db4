"""`ShardedCache`: one rank's tokens of every request; and `ShardedBatch`: one step on them.

Token i of a request is on rank i mod world. Page tables are those of rank 0, whose share of a request is
never the smaller one: so all ranks hand out the same pages, and are full at the same time.

Attention ops take requests of new tokens of which each sees one key more than the one before. On one of W
ranks that holds for every W-th new token of a request, as each sees one more of this rank's tokens than the
last such one: so a request with several new tokens becomes up to W, and queries are reordered.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from mla.cache import LatentCache
from mla.cache.ragged_batch import Batch, BatchMemory, host_ints, slots_at, whole_numbers
from mla.config import MLAConfig
from mla.parallel.layout import Share


class _Cut(NamedTuple):
    """New tokens as rows of attention, on the host."""

    order: torch.Tensor | None  # [t] int64; None where queries stay in order
    rows: torch.Tensor | None  # [R] int64: the request of each; None where it is the one of its number
    query_lens: tuple[int, ...]  # [R]
    kv_lens: tuple[int, ...]  # [R]


class _Step(NamedTuple):
    """A step on the host."""

    local: list[int]  # this rank's among the new tokens
    slots: list[int]  # of these
    positions: list[int]  # [T]
    cut: _Cut


class ShardedMemory(BatchMemory):
    """The device buffer of a step of so many new tokens, with `rows` of attention at most.

    A step of as many tokens may own fewer of them, or ask for fewer rows: it takes the first ones.
    """

    def __init__(self, tokens: int, shape: Sequence[int], device: torch.device) -> None:
        super().__init__(tokens, shape, device, wide=4)
        self.local, self.order, self.back = self.wides
        # The host's table of rows, and what it was made of.
        self._spread: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None

    def hold(self, step: _Step, table: torch.Tensor) -> None:
        """Copy a step, and the block table [B, n] int32 of its requests unless it is already here."""
        tokens, rows = self.positions.shape[0], self.kv_lens.shape[0]
        order, none = step.cut.order, list[int]()
        ways = (none, none) if order is None else (order.tolist(), order.argsort().tolist())
        cu_q = (0, *accumulate(step.cut.query_lens))
        numbers = array("i")
        for wide in (step.slots, step.local, *ways):
            numbers.frombytes(array("q", wide).tobytes())
            numbers.frombytes(bytes(8 * (tokens - len(wide))))
        for short, size in ((step.positions, tokens), (step.cut.kv_lens, rows), (cu_q, rows + 1)):
            numbers.extend(short)
            numbers.frombytes(bytes(4 * (size - len(short))))
        self.fill(torch.frombuffer(numbers, dtype=torch.int32), self._table(table, step.cut.rows))

    def _table(self, table: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """Return the table of rows [R, n]: the last one where requests are the same."""
        if self._spread is not None:
            spread, of, last = self._spread
            alike = last is rows if last is None or rows is None else torch.equal(last, rows)
            if of is table and alike:
                return spread
        spread = table if rows is None else table[rows]
        if rest := self.block_table.numel() - spread.numel():
            spread = torch.cat((spread.reshape(-1), spread.new_zeros(rest)))
        self._spread = (spread, table, rows)
        return spread


@dataclass
class Part:
    """Some new tokens of a step, and what they attend on this rank: a `mla_backends.api.BatchView`.

    Queries go to its R rows in the order `order` [t] int64, and `back` [t] is the way back; both are None
    where queries stay in order.
    """

    tokens: slice
    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    page_size: int
    block_table: torch.Tensor  # [R, n] int32
    kv_lens_device: torch.Tensor  # [R] int32
    cu_q: torch.Tensor  # [R + 1] int32
    order: torch.Tensor | None
    back: torch.Tensor | None


class ShardedBatch(Batch):
    """One step of B requests with T new tokens in all, on one rank.

    `query_lens` and `kv_lens` are those of whole requests, `positions` [T] int32 those of all new tokens.
    `local` [t] int64 are this rank's among them, `slots` [t] int64 the rows of its cache they are written to.
    """

    def __init__(
        self,
        cache: LatentCache,  # of this rank
        share: Share,
        sequences: Sequence[int],
        query_lens: Sequence[int],
        kv_lens: Sequence[int],
        block_table: torch.Tensor,  # [B, n] int32, on the host
        memory: ShardedMemory,
    ) -> None:
        super().__init__(cache.page_size, cache)
        self._describe(tuple(query_lens), tuple(kv_lens))
        self.num_tokens, self.memory = sum(query_lens), memory
        self._share, self._table = share, block_table
        one_each = self.query_lens.count(1) == len(self.query_lens)
        step = self._decode(cache, sequences) if one_each else self._step()
        memory.hold(step, block_table)
        count = len(step.local)
        self.local, self.slots, self.positions = memory.local[:count], memory.slots[:count], memory.positions
        self._whole = self._part(slice(0, self.num_tokens), step.cut, memory)

    @cached_property
    def _tokens(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The request [T], the position [T], and the keys that are here [T], of every new token."""
        queries, ends = host_ints(self.query_lens), host_ints(accumulate(self.query_lens))
        request = torch.arange(len(queries), device="cpu").repeat_interleave(queries)
        positions = torch.arange(self.num_tokens, device="cpu") + (host_ints(self.kv_lens) - ends)[request]
        return request, positions, self._share.held(positions + 1)

    def _step(self) -> _Step:
        """Work out a step of any number of new tokens."""
        request, positions, seen = self._tokens
        local = self._share.owns(positions).nonzero().view(-1)
        starts = request[local] * self._table.shape[1]
        slots = slots_at(self._table, starts, seen[local] - 1, self.page_size)
        cut = self._cut(slice(0, self.num_tokens))
        return _Step(local.tolist(), slots.tolist(), positions.tolist(), cut)

    def _decode(self, cache: LatentCache, sequences: Sequence[int]) -> _Step:
        """Work out a step of one new token each: a few integers, not worth tensor arithmetic."""
        seen = [self._share.held(length) for length in self.kv_lens]
        local = [request for request, length in enumerate(self.kv_lens) if self._share.owns(length - 1)]
        slots = [cache.slot(sequences[request], seen[request] - 1) for request in local]
        positions = [length - 1 for length in self.kv_lens]
        return _Step(local, slots, positions, _Cut(None, None, self.query_lens, tuple(seen)))

    def parts(self, most: int) -> tuple[Part, ...]:
        """Return the step's tokens in parts of at most `most`, which is positive; none without new tokens."""
        if self.num_tokens <= most:
            return (self._whole,) if self.num_tokens else ()
        return self.memo(("parts", most), lambda: tuple(self._split(most)))

    def _split(self, most: int) -> Iterator[Part]:
        width, device = self._table.shape[1], self.positions.device
        for first in range(0, self.num_tokens, most):
            tokens = slice(first, min(first + most, self.num_tokens))
            cut = self._cut(tokens)
            memory = ShardedMemory(tokens.stop - first, (len(cut.kv_lens), width), device)
            memory.hold(_Step([], [], [], cut), self._table)
            yield self._part(tokens, cut, memory)

    def _cut(self, tokens: slice) -> _Cut:
        request, positions, seen = (column[tokens] for column in self._tokens)
        order = _order(self._share, request, positions, self.query_lens)
        if order is None:
            return _Cut(None, *_cut(request, seen))
        return _Cut(order, *_cut(request[order], seen[order]))

    def _part(self, tokens: slice, cut: _Cut, memory: ShardedMemory) -> Part:
        """Return a part that `memory` holds."""
        count, same = len(cut.kv_lens), cut.order is None
        device = memory.block_table, memory.kv_lens, memory.cu_q
        if count < memory.kv_lens.shape[0]:
            device = memory.block_table[:count], memory.kv_lens[:count], memory.cu_q[: count + 1]
        ways = (None, None) if same else (memory.order, memory.back)
        return Part(tokens, cut.query_lens, cut.kv_lens, self.page_size, *device, *ways)


def _order(
    share: Share, request: torch.Tensor, positions: torch.Tensor, query_lens: Sequence[int]
) -> torch.Tensor | None:
    """Return new tokens [T] so that those of a request of which each sees one key more are adjacent.

    None where they stay in order.
    """
    if max(query_lens, default=0) <= 1:
        return None
    order = (request * share.world + positions.remainder(share.world)).argsort(stable=True)
    return None if bool((order[1:] > order[:-1]).all()) else order


def _cut(request: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...], tuple[int, ...]]:
    """Cut tokens, which see `seen` [T] keys, into rows of attention.

    Returns the request [R], the queries [R] and the keys [R] of each. Tokens without keys stand alone: the
    tokens of a request that has any all see some.
    """
    joined = (request[1:] == request[:-1]) & (seen[1:] == seen[:-1] + 1) & (seen[:-1] > 0)
    starts = torch.cat((torch.zeros(1, dtype=torch.int64, device="cpu"), (~joined).nonzero().view(-1) + 1))
    starts = starts[: len(request)]  # of no tokens there are no rows
    cu_q = torch.cat((starts, torch.tensor([len(request)], device="cpu")))
    return request[starts], tuple(cu_q.diff().tolist()), tuple(seen[cu_q[1:] - 1].tolist())


class ShardedCache(LatentCache):
    """A `LatentCache` that holds one share of the tokens; lengths are those of whole requests.

    `share` says which tokens. Other arguments are `LatentCache`'s, with `max_tokens` of all ranks together.
    `pages` [layers, pages, page_size, c + r, or bytes] hold this share's latents; every rank has `num_pages`
    of them. Ids of sequences are the same on every rank; `load` takes the history of all ranks, and `slot`,
    `slots`, `read` and `read_index` are of this one's tokens alone.
    """

    def __init__(self, config: MLAConfig, share: Share, *, max_tokens: int, **arguments: Any) -> None:
        super().__init__(config, max_tokens=share.first(max_tokens), **arguments)
        self.share = share
        self._last_memory: ShardedMemory | None = None

    def slots(self, sequence: int) -> torch.Tensor:
        """Return the rows of a flattened layer that hold this rank's tokens of a sequence, in their order."""
        return super().slots(sequence)[: self.share.held(self.length(sequence))]

    def extend(  # type: ignore[override]
        self, sequences: Sequence[int], query_lens: Sequence[int]
    ) -> ShardedBatch:
        """Make room for `query_lens[i]` new tokens of each sequence and return the step's batch.

        Raises what `LatentCache.extend` does, on every rank or on none.
        """
        sequences, query_lens = whole_numbers("sequences", sequences), whole_numbers("query_lens", query_lens)
        table = self.grow(sequences, query_lens)
        # Each of `world` classes of tokens is a row, and its first token one more where it sees no key.
        rows = sum(min(new, 2 * self.share.world) for new in query_lens)
        size = sum(query_lens), (rows, table.shape[1]), self.pages.device
        memory = self._last_memory = ShardedMemory.of(self._last_memory, *size)
        kv_lens = [*map(self.length, sequences)]
        return ShardedBatch(self, self.share, sequences, query_lens, kv_lens, table, memory)

    def _rows(self, length: int) -> int:
        return self.share.first(length)

    def _reserve(self, entries: Any, lengths: Sequence[int]) -> None:
        super()._reserve(entries, [*map(self.share.first, lengths)])

    def _held(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.share.owns(torch.arange(x.shape[0], device=x.device))]
