"""`RaggedBatch`: the lengths and tables of one step, on the host and on the device.

Tokens of all requests lie back to back; nothing is padded. Everything a kernel needs reaches the device in
one packed copy, because many small copies cost more than a decode step can spare.
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import accumulate
from operator import index
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from mla.errors import StaleBatch
from mla_backends.operands import misfit
from mla_backends.outside import shortened
from mla_backends.upload import upload_into

if TYPE_CHECKING:
    from mla.cache.latent_cache import LatentCache

Value = TypeVar("Value")
Memory = TypeVar("Memory", bound="BatchMemory")

MAX_TOKENS = 2**31 - 1  # lengths and positions are int32


def host_ints(values: Iterable[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Return a host tensor of `values`; several times faster than `torch.tensor` for short lists."""
    buffer = array("q" if dtype == torch.int64 else "i", values)
    return torch.frombuffer(buffer, dtype=dtype) if buffer else torch.empty(0, dtype=dtype, device="cpu")


def whole_numbers(name: str, values: Iterable[Any]) -> list[int]:
    """Return integers of any kind, also numpy's and torch's, as a list of Python's. Raises ValueError."""
    try:
        return [*map(index, values)]
    except (TypeError, RuntimeError) as error:
        kind = "whole numbers" if isinstance(values, Iterable) else "a list of whole numbers"
        raise ValueError(f"{name} must be {kind}, got {values!r:.80}.") from error


def check_page_size(page_size: Any) -> int:
    """Return an integer of any kind as Python's. Raises ValueError unless it is a power of two."""
    size = index(page_size) if hasattr(page_size, "__index__") and not isinstance(page_size, bool) else 0
    if size < 1 or size & (size - 1):
        raise ValueError(f"page_size must be a power of two, got {page_size!r}.")
    return size


def check_dtype(dtype: Any) -> torch.dtype:
    """Return a floating-point dtype. Raises ValueError for anything else."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point one, such as torch.bfloat16, got {dtype!r:.80}.")
    return dtype


def slots_at(table: torch.Tensor, starts: Any, positions: torch.Tensor, page_size: int) -> torch.Tensor:
    """Return the rows [t] int64 of a flattened cache that hold tokens at `positions` [t] of requests.

    `starts` says where the row of each in the block table [B, n] begins, once that is flattened.
    """
    shift, mask = page_size.bit_length() - 1, page_size - 1
    pages = table.view(-1).index_select(0, starts + (positions >> shift)).long()
    return (pages << shift) + (positions & mask)


class BatchMemory:
    """The int32 device buffer of a batch's tables, and views of its parts.

    Making the views costs more than filling them, so a cache fills the same memory for every step of one
    shape. That is safe because a batch is void as soon as the next one exists, and a device runs its work in
    order.
    """

    def __init__(self, tokens: int, shape: Sequence[int], device: torch.device, wide: int = 1) -> None:
        """Make memory for `tokens` new tokens, so many `wide` numbers of each, and a table of `shape`."""
        rows, width = shape
        sizes = (2 * tokens,) * wide + (tokens, rows, rows + 1, rows * width)
        with torch.inference_mode(False):
            self.buffer = torch.empty(sum(sizes), dtype=torch.int32, device=device)
        *wides, self.positions, self.kv_lens, self.cu_q, table = self.buffer.split(sizes)
        self.slots, *self.wides = (part.view(torch.int64) for part in wides)
        self.block_table = table.view(rows, width)
        self._numbers = self.buffer[: self.buffer.shape[0] - rows * width]
        self._held: torch.Tensor | None = None  # the host's block table that `block_table` is a copy of
        self._kept: dict[Hashable, Any] = {}

    @classmethod
    def of(
        cls: type[Memory], last: Memory | None, tokens: int, shape: Sequence[int], device: torch.device
    ) -> Memory:
        """Return the memory of the last step where a batch of this shape fits it, else a new one."""
        if last is not None and last.positions.shape[0] == tokens and last.block_table.shape == shape:
            return last
        return cls(tokens, shape, device)

    def keep(self, key: Hashable, build: Callable[[], Value]) -> Value:
        """Return memory for data derived from a batch, made once per key.

        Every batch overwrites it, as it does the rest, so only the latest one may use it.
        """
        if key not in self._kept:
            with torch.inference_mode(False):  # a tensor made in that mode cannot be written outside it
                self._kept[key] = build()
        return cast("Value", self._kept[key])

    def fill(self, numbers: torch.Tensor, table: torch.Tensor) -> None:
        """Copy what a batch packed, and its block table unless it is already here, in one copy."""
        if table is self._held:
            upload_into(numbers, self._numbers)
            return
        self._held = None  # until it is here
        upload_into(torch.cat((numbers, table.view(-1))), self.buffer)
        self._held = table

    def take(self, other: BatchMemory) -> None:
        """Copy the tables of another batch of the same shape, unless it is that batch's memory already."""
        if other is self:
            return
        self.buffer.copy_(other.buffer)
        self._held = other._held


class Batch:
    """The lengths of one step, of new tokens and of whole requests, and what was derived from them."""

    num_tokens: int

    def __init__(self, page_size: int, source: LatentCache | None) -> None:
        self.page_size = page_size
        # Weak: a plan in the memo refers to its batch, and this cycle must not hold the pages of a cache.
        self._source = None if source is None else weakref.ref(source)
        self._num_pages = None if source is None else source.num_pages

    def _describe(self, query_lens: tuple[int, ...], kv_lens: tuple[int, ...]) -> None:
        self.query_lens, self.kv_lens = query_lens, kv_lens
        cache = self._cache()
        self._generation = 0 if cache is None else cache.generation
        self._memo: dict[Hashable, Any] = {}

    def _cache(self) -> LatentCache | None:
        """Return the cache that this batch describes, or None if there is none or it is gone."""
        return None if self._source is None else self._source()

    def memo(self, key: Hashable, build: Callable[[], Value]) -> Value:
        """Return what `build` made for `key`, building it at most once per batch."""
        if key not in self._memo:
            self._memo[key] = build()
        return cast("Value", self._memo[key])

    def fits(self, pages: int) -> bool:
        """Return whether a cache of `pages` pages can be the one this batch describes."""
        return self._num_pages is None or self._num_pages == pages

    def check_current(self) -> None:
        """Raise `StaleBatch` when the cache has changed since this batch was made, or is gone."""
        cache = self._cache()
        if cache is None and self._source is not None:
            raise StaleBatch("the cache of this batch is gone: keep it for as long as its batches run.")
        if cache is not None and cache.generation != self._generation:
            raise StaleBatch(
                "this batch is out of date, as its cache has changed: use the batch of the last `extend`."
            )


class RaggedBatch(Batch):
    """One step of B requests with T new tokens in all.

    Host: `query_lens` (new tokens per request), `kv_lens` (tokens attended per request, new ones included).
    Device: `positions` [T] int32, `slots` [T] int64 (row of the flattened cache that a new token is written
    to), `block_table` [B, n] int32 (page of each run of `page_size` tokens), `kv_lens_device` [B] int32,
    `cu_q` [B + 1] int32 (where each request's tokens start).
    Raises ValueError for lengths, a table or a page size that describe no step.
    """

    def __init__(
        self,
        query_lens: Sequence[int],
        kv_lens: Sequence[int],
        block_table: torch.Tensor,  # [B, n] int32, on the host
        page_size: int,
        device: torch.device,
        source: LatentCache | None = None,
        slots: Sequence[int] | None = None,  # of the new tokens, where the caller knows them
        memory: BatchMemory | None = None,  # of this shape, where the caller has some to reuse
    ) -> None:
        page_size = check_page_size(page_size)
        if source is None:
            query_lens, kv_lens = _lengths(query_lens, kv_lens)
            _check_table(block_table, kv_lens, page_size)
        super().__init__(page_size, source)
        self.device = device
        self._tabulate(tuple(query_lens), tuple(kv_lens), block_table)
        self.memory = memory or BatchMemory(self.num_tokens, block_table.shape, device)
        self.memory.fill(self._pack(slots), block_table)
        self.slots, self.positions = self.memory.slots, self.memory.positions
        self.kv_lens_device, self.cu_q = self.memory.kv_lens, self.memory.cu_q
        self.block_table = self.memory.block_table

    def _tabulate(self, query_lens: tuple[int, ...], kv_lens: tuple[int, ...], table: torch.Tensor) -> None:
        """Derive every host-side length and table."""
        self._describe(query_lens, kv_lens)
        self.cu_q_host = (0, *accumulate(query_lens))
        self.num_tokens = self.cu_q_host[-1]
        self.block_table_host = table

    def __repr__(self) -> str:
        """Return the lengths of the step, its table and its device."""
        return (
            f"RaggedBatch(query_lens={shortened(str([*self.query_lens]))}, "
            f"kv_lens={shortened(str([*self.kv_lens]))}, block_table={list(self.block_table.shape)}, "
            f"page_size={self.page_size}, device={self.device})"
        )

    def _pack(self, slots: Sequence[int] | None) -> torch.Tensor:
        """Lay slots, positions, kv_lens and cu_q out in one int32 host buffer."""
        if slots is not None and len(slots) == len(self.kv_lens):  # decode: one token each
            numbers = array("i")
            numbers.frombytes(array("q", slots).tobytes())
            numbers.extend([kv_len - 1 for kv_len in self.kv_lens])
            numbers.extend(self.kv_lens)
            numbers.extend(self.cu_q_host)
            return torch.frombuffer(numbers, dtype=torch.int32)
        lengths = host_ints((*self.kv_lens, *self.cu_q_host), torch.int32)
        slots_of_all, positions = self._slots_and_positions()
        return torch.cat((slots_of_all.view(torch.int32), positions.int(), lengths))

    def _slots_and_positions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the slots [T] and positions [T] int64 of all new tokens."""
        width, queries = self.block_table_host.shape[1], host_ints(self.query_lens)
        firsts = zip(self.kv_lens, self.query_lens, self.cu_q_host, strict=False)
        offset = host_ints(kv_len - query_len - first for kv_len, query_len, first in firsts)
        positions = torch.arange(self.num_tokens, device="cpu") + offset.repeat_interleave(queries)
        starts = host_ints(range(0, width * len(queries), width)).repeat_interleave(queries)
        return slots_at(self.block_table_host, starts, positions, self.page_size), positions

    def subset(self, requests: Sequence[int]) -> RaggedBatch:
        """Return a batch of only `requests` (indices into this one)."""
        return RaggedBatch(
            [self.query_lens[i] for i in requests],
            [self.kv_lens[i] for i in requests],
            self.block_table_host.index_select(0, host_ints(requests)),
            self.page_size,
            self.device,
            self._cache(),
        )

    def update_(self, other: RaggedBatch) -> RaggedBatch:
        """Take over the lengths of `other` in place, keeping every device address (for graph replay).

        Raises ValueError when the shapes differ.
        """
        if (self.query_lens, self.page_size) != (other.query_lens, other.page_size):
            raise ValueError("update_() needs a batch of the same query_lens and page_size.")
        if self.block_table.shape != other.block_table.shape:
            raise ValueError("update_() needs a block table of the same width.")
        other.check_current()
        self._tabulate(other.query_lens, other.kv_lens, other.block_table_host)
        self.memory.take(other.memory)
        return self


def _lengths(query_lens: Sequence[int], kv_lens: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the lengths of a step as Python's integers. Raises ValueError for those of none."""
    new, kept = whole_numbers("query_lens", query_lens), whole_numbers("kv_lens", kv_lens)
    if len(kept) != len(new) or any(not 0 <= q <= kv for q, kv in zip(new, kept, strict=True)):
        raise ValueError(f"kv_lens {kept} must include the new tokens {new}, request by request.")
    if max((*kept, sum(new))) > MAX_TOKENS:
        raise ValueError(f"a step and a request have at most {MAX_TOKENS} tokens: split it.")
    return new, kept


def _check_table(table: torch.Tensor, kv_lens: Sequence[int], page_size: int) -> None:
    """Raise ValueError unless this is a block table on the host that has pages for these lengths."""
    if wrong := misfit(table, (len(kv_lens), None), torch.int32, torch.device("cpu")):
        raise ValueError(f"block_table {wrong}")
    if (longest := max(kv_lens, default=0)) > table.shape[1] * page_size:
        raise ValueError(
            f"block_table {list(table.shape)} has too few pages of {page_size} tokens for a request of "
            f"{longest}: it must be [{len(kv_lens)}, n >= {-(-longest // page_size)}]."
        )
