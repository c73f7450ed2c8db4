"""Output buffers of a pass: one for each forward, or for a random choice of them where memory is short."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")

# The most bytes of output buffers of one implementation.
SHELF_BYTES = 256 << 20


def buffers(wanted: int, size: int) -> int:
    """Return the number of output buffers of `size` bytes for `wanted` forwards; at least three."""
    return min(wanted, max(3, SHELF_BYTES // max(1, size)))


class Shelf(Generic[T]):
    """Hands out a poisoned buffer per forward, and keeps filled ones, all or a uniform random choice.

    Which are kept is drawn after the forward, from the system's entropy, so no forward knows whether it is.
    """

    def __init__(self, items: Sequence[T], wanted: int, poison: Callable[[T], None]) -> None:
        self._items, self._poison = list(items), poison
        self._room = len(items) if len(items) >= wanted else len(items) - 1
        self._random: random.Random = random.SystemRandom()
        self.kept: dict[int, T] = {}  # index of the forward -> its buffer
        self.clear()

    def draw_from(self, numbers: random.Random) -> None:
        """Draw what is kept from these numbers, which several shelves may share."""
        self._random = numbers

    def clear(self) -> None:
        """Poison all buffers, for a new pass."""
        for item in self._items:
            self._poison(item)
        self._free = list(reversed(self._items))
        self._done = 0
        self.kept = {}

    def next(self) -> T:
        """Return the buffer that the next forward writes."""
        return self._free[-1]

    def keep(self, index: int) -> None:
        """Keep the buffer that forward `index` wrote, or one of those kept so far instead."""
        self._done += 1
        filled = self._free.pop()
        if len(self.kept) < self._room:
            self.kept[index] = filled
            return
        place = self._random.randrange(self._done)
        if place < self._room:
            given_up = list(self.kept)[place]
            self.kept[index], filled = filled, self.kept.pop(given_up)
        self._poison(filled)
        self._free.append(filled)
