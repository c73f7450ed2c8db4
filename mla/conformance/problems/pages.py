"""Latents spread over the pages of a cache: which page holds what, and what lies around."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mla.conformance.problems.attention import AttentionProblem
from mla.conformance.problems.guards import Guarded
from mla.conformance.problems.reach import allocate


@dataclass(frozen=True)
class Layout:
    """What surrounds the numbers that count."""

    unowned: float = 0.0  # in pages that no request owns
    tail: float = 0.0  # in slots past a request's end
    strided: bool = False  # inputs and outputs are slices of wider tensors
    pages_before: int = 0  # that lie in front of all others, nobody owns and nobody writes
    pages: int = 0  # of a large cache that is hardly ever touched; 0: those that are owned, and a few more
    apart: int = 0  # numbers from one row of an input or output to the next; 0: they are adjacent
    shuffle: int = 0  # which of the orders that pages may have

    @property
    def sparse(self) -> bool:
        """Return whether most of the cache is never written."""
        return bool(self.pages_before or self.pages)

    @property
    def label(self) -> str:
        """What is special about the layout, for reports."""
        words = [" strided"] * self.strided + [f" in {self.pages} pages"] * bool(self.pages)
        return "".join(words)


PLAIN = Layout()


class Paged(NamedTuple):
    """Latents in pages, and who owns them. Unused columns of the table name an unowned page."""

    pages: torch.Tensor  # [n, page, c + r] on the host: what an unowned page holds, then those that are owned
    order: list[int]  # [n]: where these pages are in the cache
    total: int  # pages of the cache
    block_table: torch.Tensor  # [B, n] int32 on the host

    @property
    def unowned(self) -> int:
        """A page that nobody owns."""
        return self.order[0]

    def compact(self, device: torch.device) -> Guarded:
        """Return the whole cache on the device, with a page on either side that nobody owns."""
        place = slice(1, 1 + self.total)
        fill = self.pages[0, 0, 0].item()
        whole = torch.full(
            (self.total + 2, *self.pages.shape[1:]), fill, dtype=self.pages.dtype, device=device
        )
        whole[place].index_copy_(0, torch.tensor(self.order, device=device), self.pages.to(device))
        return Guarded(whole[place], whole, (place,), fill)

    def sparse(self, device: torch.device) -> torch.Tensor:
        """Return the cache on the device, nothing else of it written. Raises `Refused` if it is too large."""
        cache = allocate((self.total, *self.pages.shape[1:]), self.pages.dtype, device)
        for place, page in zip(self.order, self.pages, strict=True):  # an index could be too narrow, too
            cache[place].copy_(page)
        return cache


def spread(
    problem: AttentionProblem, latents: Sequence[torch.Tensor], dtype: torch.dtype, layout: Layout
) -> Paged:
    """Spread every request's latents [s, 1, c + r] over pages of its own, which are not in order."""
    size, width = problem.page_size, problem.dims.latent
    counts = [-(-length // size) for length in problem.kv_lens]
    order, total = _order(sum(counts) + 1, layout)
    owned = torch.tensor(order[1:], dtype=torch.int32).split(counts)
    table = torch.full((len(counts), max(1, *counts) + 1), order[0], dtype=torch.int32)
    pages = torch.full((len(order), size, width), layout.tail, dtype=dtype)
    pages[0] = layout.unowned
    slots, first = pages.view(-1, width), size
    for row, places, rows in zip(table, owned, latents, strict=True):
        row[: len(places)] = places
        slots[first : first + len(rows)] = rows[:, 0]
        first += len(places) * size
    if shared := problem.common // size:
        _share(table, shared, counts, pages, layout.unowned)
    return Paged(pages, order, total, table)


def _share(table: torch.Tensor, shared: int, counts: list[int], pages: torch.Tensor, unowned: float) -> None:
    """Let all requests name the first one's pages in their first columns; nobody owns theirs any more."""
    table[1:, :shared] = table[0, :shared]
    for first in list(itertools.accumulate(counts))[:-1]:
        pages[1 + first : 1 + first + shared] = unowned


def _order(needed: int, layout: Layout) -> tuple[list[int], int]:
    """Return where pages are, an unowned one first, and how many there are in all."""
    generator = torch.Generator().manual_seed(needed + 1000 * layout.shuffle)
    shuffled = torch.randperm(needed, generator=generator)
    if layout.pages:
        last = edges(layout.pages)[:needed]
        return [last[i] for i in shuffled], layout.pages
    return (
        shuffled + layout.pages_before
    ).tolist(), needed + layout.pages_before  # the first and the last, too


def edges(pages: int) -> list[int]:
    """Return pages next to powers of two, from which on a narrow index wraps, the last first."""
    powers = [1 << bits for bits in range(pages.bit_length())]
    near = {power + beside for power in powers for beside in (-1, 0, 1, 2)}
    return sorted((page for page in {*near, pages - 1} if page < pages), reverse=True)
