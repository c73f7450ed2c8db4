"""Where rows of an output come from: request, position, head, and page and slot of the cache.

A reader looks for a wrong row in the request it belongs to. So rows are named by what they are, and not by
their index alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mla.verify.patterns import Coordinates, pattern


@dataclass(frozen=True)
class Places:
    """Coordinates of T rows, on the host. Built by `new_tokens` or `context`."""

    request: torch.Tensor  # [T] int64
    position: torch.Tensor  # [T] int64, in the request, history included
    first: torch.Tensor  # [T] int64: position of the request's first row
    kv_lens: torch.Tensor  # [B] int64
    slot: torch.Tensor | None = None  # [T] int64: row of the flattened cache
    page_size: int | None = None

    @classmethod
    def new_tokens(
        cls,
        query_lens: Sequence[int],
        kv_lens: Sequence[int],
        block_table: torch.Tensor | None = None,  # [B, n]
        page_size: int | None = None,
    ) -> Places:
        """Return the places of a step's new tokens; with a block table also those in the cache."""
        return cls._of(query_lens, kv_lens, block_table, page_size)

    @classmethod
    def context(cls, kv_lens: Sequence[int]) -> Places:
        """Return the places of all tokens of all requests, for what works on the whole context."""
        return cls._of(kv_lens, kv_lens, None, None)

    @classmethod
    def _of(
        cls,
        rows: Sequence[int],
        kv_lens: Sequence[int],
        block_table: torch.Tensor | None,
        page_size: int | None,
    ) -> Places:
        counts, keys = torch.tensor(rows, dtype=torch.int64), torch.tensor(kv_lens, dtype=torch.int64)
        request = torch.arange(len(counts)).repeat_interleave(counts)
        starts = counts.cumsum(0) - counts
        first = (keys - counts)[request]
        position = torch.arange(len(request)) - starts[request] + first
        slot = None
        if block_table is not None and page_size:
            table = block_table.detach().cpu().long()
            pages = (position // page_size).clamp_min(0)  # of more new tokens than keys, the first have none
            slot = table[request, pages] * page_size + position % page_size
        return cls(request, position, first, keys, slot, page_size)

    def __len__(self) -> int:
        return len(self.request)

    def coordinates(self) -> Coordinates:
        """Return what patterns are looked for in."""
        return Coordinates(
            request=self.request,
            position=self.position,
            token=self.position - self.first,
            kv_len=self.kv_lens[self.request],
            page=None if self.slot is None or not self.page_size else self.slot // self.page_size,
            page_size=self.page_size,
        )

    def name(self, row: int, head: int | None = None) -> str:
        """Return "request 3, position 105, head 6 (row 12; page 9, slot 41)"."""
        words = [f"request {int(self.request[row])}", f"position {int(self.position[row])}"]
        words += [] if head is None else [f"head {head}"]
        where = f"row {row}"
        if self.slot is not None and self.page_size:
            page, slot = divmod(int(self.slot[row]), self.page_size)
            where += f"; page {page}, slot {slot}"
        return f"{', '.join(words)} ({where})"


def name_row(index: Sequence[int], places: Places | None) -> str:
    """Return the name of a row by its index, [t] or [t, head]; "row 3, head 5" where places are unknown."""
    if places is not None:
        return places.name(*index)
    return ", ".join(f"{what} {number}" for what, number in zip(("row", "head"), index, strict=False))


def describe(bad: torch.Tensor, places: Places | None, worst: int | None = None) -> str:
    """Return where the bad rows are: the name of one, and what they have in common if that is clear.

    `bad`: [T] or [T, h] bool with at least one true; `worst`: flat index of the row to name, by default the
    first bad one. Such as "request 3, position 105, head 6 (row 12); every row of request 3". The rows of
    `places` must be those of `bad`.
    """
    bad = bad.detach().cpu()
    flat = int(bad.flatten().int().argmax()) if worst is None else worst
    index = [int(i) for i in torch.unravel_index(torch.tensor(flat), bad.shape)]
    named = name_row(index, places)
    common = pattern_of(bad, places)
    return f"{named}; {common}" if common else named


def pattern_of(bad: torch.Tensor, places: Places | None) -> str:
    """Return what all bad rows [T] or [T, h] have in common; "" where nothing is clear."""
    where = Coordinates(torch.zeros(len(bad), dtype=torch.int64)) if places is None else places.coordinates()
    return pattern(bad.detach().cpu(), where)
