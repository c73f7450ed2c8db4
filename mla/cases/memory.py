"""How a case lies in memory: wider rows around operands, pages out of order, poison where nobody reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from mla.verify.layer_check import stands_for
from mla.verify.places import Places

Tensors = dict[str, torch.Tensor]
Gaps = tuple[int, int, int]
NO_GAPS = (0, 0, 0)

GUARD = 32  # rows before and behind a tensor, where a kernel writes that rounds its rows up
FAR_APART = 1 << 20  # numbers from one row to the next
ALIGNED, MAX_BESIDE = 64, 1 << 14  # numbers: pieces begin at multiples, and have as many beside them at most

# Bound before any plugin loads, which may replace methods of torch.
_empty_like, _copy, _fill = torch.empty_like, torch.Tensor.copy_, torch.Tensor.fill_


@dataclass(frozen=True)
class Layout:
    """What surrounds the numbers that count."""

    page_size: int = 64
    spare: int = 1  # pages that nobody owns; unused columns of a table name one of them
    columns: int = 1  # of a table, that nobody uses
    shuffle: int = 0  # which of the orders that pages may have
    unowned: float = 0.0  # in pages that nobody owns
    tail: float = 0.0  # in slots past a request's end
    pages_before: int = 0  # that lie in front of all others, nobody owns and nobody writes
    pages: int = 0  # of a large cache that is hardly ever touched; 0: those owned, and the spare ones
    apart: int = 0  # numbers from one row of an operand to the next; 0: they are adjacent
    # Operand or result -> numbers before its first, behind every row, and behind every part of a row.
    gaps: Mapping[str, Gaps] = field(default_factory=dict, hash=False)
    shared: tuple[int, ...] = ()  # per request: its first pages that are those of the request before it ...
    of_first: bool = False  # ... or of the first request
    repeated: bool = False  # the second full page of a request is its first

    @property
    def label(self) -> str:
        """What is special about the layout, for reports."""
        words = [f" in {self.pages} pages"] * bool(self.pages)
        words += [f", strided {' '.join(sorted(self.gaps))}"] * bool(self.gaps)
        words += [", shared pages"] * any(self.shared) + [", a page named twice"] * self.repeated
        return "".join(words)


PLAIN_LAYOUT = Layout()


class NoRoom(Exception):
    """There is not as much memory as a layout takes."""


def strides(shape: Sequence[int], gaps: Gaps) -> tuple[int, ...]:
    """Return the strides of a tensor that has `gaps`."""
    stride = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        stride[dim] = stride[dim + 1] * max(1, shape[dim + 1]) + gaps[1 if dim == 0 else 2]
    return tuple(stride)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Overwrite a tensor with NaN; integers with their largest."""
    return _fill(tensor, torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)


def poison_all(tensors: Tensors) -> None:
    """Overwrite every tensor."""
    for tensor in tensors.values():
        poison(tensor)


def same_numbers(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return where two tensors agree; NaN agrees with NaN."""
    return (left == right) | (left.isnan() & right.isnan())


def changed_slots(
    cache: torch.Tensor, before: torch.Tensor, written: torch.Tensor | None = None
) -> tuple[int, str]:
    """Return how many slots of a cache [pages, page, w] differ from `before`, and the name of the first.

    Rows `written` [T] of the flattened cache do not count.
    """
    changed = (words(cache) != words(before.to(cache.device))).any(-1).flatten().cpu()
    if written is not None:
        changed[written.cpu()] = False
    page, slot = divmod(int(changed.int().argmax()), cache.shape[1])
    return int(changed.sum()), f"slot {slot} of page {page}"


def on_host(tensors: Tensors) -> Tensors:
    """Return copies on the host."""
    return {name: _copy(_empty_like(tensor, device="cpu"), tensor) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Pages:
    """Pages of requests, which are not in order."""

    layout: Layout
    count: int  # of the cache
    order: torch.Tensor  # [n] int64: where pages are, the spare ones first
    table: torch.Tensor  # [B, m] int32 on the host
    slots: torch.Tensor  # [K] int64: the row of the flattened cache of every key

    @classmethod
    def of(cls, lengths: Sequence[int], layout: Layout) -> Pages:
        """Hand out pages to requests of these lengths, as the layout says which pages they share."""
        size, keys = layout.page_size, torch.tensor(lengths)
        owned = (keys + size - 1) // size
        order, count = _order(layout.spare + int(owned.sum()), layout)
        columns = max(1 + layout.repeated, int(owned.max())) + layout.columns
        table = torch.full((len(lengths), columns), int(order[0]), dtype=torch.int32)
        table[torch.arange(columns) < owned[:, None]] = order[layout.spare :].int()
        for request, first in enumerate(layout.shared):
            if first:
                table[request, :first] = table[0 if layout.of_first else request - 1, :first]
        if layout.repeated:
            full = keys >= 2 * size
            table[full, 1] = table[full, 0]
        slots = Places.new_tokens(lengths, lengths, table, size).slot
        assert slots is not None  # there is a table
        return cls(layout, count, order, table, slots)

    @property
    def first(self) -> torch.Tensor:
        """The first key [K] int64 that lies where each key lies; itself where no page is shared."""
        slots, inverse = self.slots.unique(return_inverse=True)
        first = torch.full((len(slots),), len(self.slots))
        return first.scatter_reduce_(0, inverse, torch.arange(len(self.slots)), "amin")[inverse]

    def blocks(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the pages [n, page, w] in `order`, that hold keys [K, w]."""
        size, (rising, places) = self.layout.page_size, self.order.sort()
        pages = places[torch.searchsorted(rising, self.slots // size)]  # of any cache
        unowned, tail = (stands_for(value, rows.dtype) for value in (self.layout.unowned, self.layout.tail))
        blocks = torch.full((len(self.order), size, rows.shape[1]), unowned, dtype=rows.dtype)
        blocks[pages.unique()] = tail
        blocks[pages, self.slots % size] = rows
        return blocks

    def cache(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the whole cache [pages, page, w] on the host, that holds keys [K, w]."""
        blocks, unowned = self.blocks(rows), stands_for(self.layout.unowned, rows.dtype)
        cache = torch.full((self.count, *blocks.shape[1:]), unowned, dtype=rows.dtype)
        cache[self.order] = blocks
        return cache


def _order(needed: int, layout: Layout) -> tuple[torch.Tensor, int]:
    """Return where so many pages are, and how many there are in all."""
    generator = torch.Generator().manual_seed(needed + 1000 * layout.shuffle)
    shuffled = torch.randperm(needed, generator=generator)
    if layout.pages:
        return torch.tensor(edges(layout.pages)[:needed])[shuffled], layout.pages
    return shuffled + layout.pages_before, needed + layout.pages_before  # the first and the last, too


def edges(pages: int) -> list[int]:
    """Return pages next to powers of two, from which on a narrow index wraps, the last first."""
    powers = [1 << bits for bits in range(pages.bit_length())]
    near = {power + beside for power in powers for beside in (-1, 0, 1, 2)}
    return sorted((page for page in {*near, pages - 1} if page < pages), reverse=True)


# ------------------------------------------------------------------------------------------------ guards


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return memory that nobody has written to. Raises `NoRoom` if there is not as much."""
    try:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    except (RuntimeError, MemoryError) as error:
        gigabytes = math.prod(shape) * dtype.itemsize / 1e9
        raise NoRoom(f"{gigabytes:.2g} GB could not be allocated") from error


def scattered(tensor: torch.Tensor, device: torch.device, apart: int) -> torch.Tensor:
    """Copy the rows of [n, ..] to the device, so many numbers apart. What is between them is never touched.

    They are copied one by one: a stack may count places in 32 bits. Raises `NoRoom` if that takes more memory
    than there is.
    """
    whole = allocate((tensor.shape[0] * apart,), tensor.dtype, device)
    rows = whole.as_strided(tensor.shape, (apart, *tensor.contiguous().stride()[1:]))
    for row, values in zip(rows, tensor, strict=True):
        row.copy_(values)
    return rows


def rows_on_host(rows: torch.Tensor) -> torch.Tensor:
    """Return rows [n, ...] on the host, copied one by one where they lie far apart."""
    if len(rows) < 2 or rows.stride(0) < FAR_APART:
        return rows.cpu()
    return torch.stack([row.cpu() for row in rows])


def hardly_touched(pages: Pages, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a cache of keys [K, w], nothing else of it written. Raises `NoRoom` if it is too large."""
    blocks = pages.blocks(rows)
    cache = allocate((pages.count, *blocks.shape[1:]), blocks.dtype, device)
    for page, block in zip(pages.order.tolist(), blocks, strict=True):  # one by one, as in `scattered`
        cache[page].copy_(block)
    return cache


class Piece:
    """Memory on a device, full of `fill`, and a tensor that lies somewhere in it."""

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        gaps: Gaps = NO_GAPS,
        guard: int = GUARD,
        fill: float = math.nan,
        beside: int = MAX_BESIDE,
    ) -> None:
        """`gaps`: numbers before the first, behind every row, and behind every part of a row.

        `guard`: rows of nobody before and behind, of `beside` numbers at most. In integers, NaN is their
        largest.
        """
        stride = strides(shape, gaps)
        row = stride[0]
        beside = -(-min(guard * row, beside) // ALIGNED) * ALIGNED
        before, count = beside + gaps[0], 2 * beside + -(-(gaps[0] + shape[0] * row) // ALIGNED) * ALIGNED
        self.whole = torch.empty((count,), dtype=dtype, device=device)
        self.part = self.whole.as_strided(tuple(shape), stride, before)
        _fill(self.whole, stands_for(fill, dtype))
        self.sealed = self.initial = self.whole  # what it holds before a call; and of which it was made
        self._view = (tuple(shape), stride, before)

    def seal(self) -> None:
        """Remember what all of the memory holds."""
        self.sealed = self.initial = self.whole.clone()

    def restore(self, other: Piece) -> None:
        """Hold what another piece of the same layout held when it was sealed; or this one itself."""
        _copy(self.whole, other.initial)
        self.sealed = other.initial

    def again(self, other: Piece) -> None:
        """Do what `restore` does where nothing but the tensor was written since."""
        _copy(self.part, other.initial.as_strided(*self._view))

    def damage(self, name: str, output: bool) -> str:
        """Return what has been written that should not have been, as a clause; "" if nothing."""
        now, then = self.whole.to("cpu", copy=output), self.sealed.cpu()
        if output:
            now.as_strided(*self._view).copy_(then.as_strided(*self._view))
        if same_words(now, then):
            return ""
        changed, before = words(now) != words(then), self._view[2]
        if not output and bool(changed.as_strided(*self._view).any()):
            return f"the op wrote to {name}, not one of its outputs"
        last = before + sum((size - 1) * step for size, step in zip(*self._view[:2], strict=True))
        sides = (slice(before), slice(last + 1, None), slice(before, last + 1))
        named = ("before the first row of", "behind the last row of", "beside rows of")
        side = next(name for name, side in zip(named, sides, strict=True) if bool(changed[side].any()))
        return f"memory {side} `{name}` was written"


def same_words(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Return whether two pieces, whose numbers fill words of 64 bits, hold the same bits."""
    return torch.equal(left.view(torch.int64), right.view(torch.int64))


def words(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bits of numbers as integers, so that NaN equals NaN."""
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])
