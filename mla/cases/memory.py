"""How a case lies in memory: wider rows around operands, pages out of order, poison where nobody reads."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

Tensors = dict[str, torch.Tensor]

# Bound before any plugin loads, which may replace methods of torch.
_empty_like, _copy, _fill = torch.empty_like, torch.Tensor.copy_, torch.Tensor.fill_


@dataclass(frozen=True)
class Layout:
    """What surrounds the numbers that count."""

    page_size: int = 64
    spare: int = 1  # pages that nobody owns
    shuffle: int = 0  # the seed of the order of pages
    # Operand or result -> columns before and behind its own, in wider rows.
    margins: Mapping[str, tuple[int, int]] = field(default_factory=dict, hash=False)


PLAIN = Layout()


def blank(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, margins: tuple[int, int] = (0, 0)
) -> torch.Tensor:
    """Return poisoned memory, as the columns of rows with so many more before and behind."""
    (before, behind), width = margins, shape[-1]
    wide = torch.empty((*shape[:-1], before + width + behind), dtype=dtype, device=device)
    return poison(wide)[..., before : before + width] if before or behind else poison(wide)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Overwrite a tensor with NaN; integers with their largest."""
    return _fill(tensor, torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)


def poison_all(tensors: Tensors) -> None:
    """Overwrite every tensor."""
    for one in tensors.values():
        poison(one)


def same_numbers(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return where two tensors agree; NaN agrees with NaN."""
    return (left == right) | (left.isnan() & right.isnan())


def changed_slots(
    cache: torch.Tensor, before: torch.Tensor, written: torch.Tensor | None = None
) -> tuple[int, str]:
    """Return how many slots of a cache [pages, page, w] differ from `before`, and the name of the first.

    Rows `written` [T] of the flattened cache do not count.
    """
    changed = (~same_numbers(cache, before.to(cache.device))).any(-1).flatten().cpu()
    if written is not None:
        changed[written.cpu()] = False
    page, slot = divmod(int(changed.int().argmax()), cache.shape[1])
    return int(changed.sum()), f"slot {slot} of page {page}"


def on_host(tensors: Tensors) -> Tensors:
    """Return copies on the host."""
    return {name: _copy(_empty_like(one, device="cpu"), one) for name, one in tensors.items()}


@dataclass(frozen=True)
class Pages:
    """Pages of requests. Columns of the table behind those that a request owns are 0."""

    count: int  # of the cache
    table: torch.Tensor  # [B, n] int32 on the host
    slots: torch.Tensor  # [K] int64: the row of the flattened cache of every key

    @classmethod
    def of(cls, lengths: Sequence[int], layout: Layout) -> Pages:
        """Hand out pages to requests of these lengths, in a shuffled order."""
        size, owned = layout.page_size, [-(-length // layout.page_size) for length in lengths]
        free = list(reversed(range(sum(owned) + layout.spare)))
        random.Random(layout.shuffle).shuffle(free)
        table = torch.zeros(len(lengths), max(1, *owned), dtype=torch.int32)
        slots = []
        for row, count, length in zip(table, owned, lengths, strict=True):
            pages = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int64)
            row[:count] = pages
            slots.append((pages[:, None] * size + torch.arange(size)).flatten()[:length])
        return cls(sum(owned) + layout.spare, table, torch.cat(slots))

    def fill(self, cache: torch.Tensor, rows: torch.Tensor, tail: float) -> None:
        """Write keys [K, w] to a poisoned cache, and `tail` behind every request's last one."""
        size = cache.shape[1]
        cache[(self.slots // size).unique().to(cache.device)] = tail
        cache.view(-1, cache.shape[2]).index_copy_(0, self.slots.to(cache.device), rows.to(cache))
