"""Where rows of an output come from: request, position, head, and page and slot of the cache; and what wrong
rows have in common, where that is clear: a hint at the bug.

A reader looks for a wrong row in the request it belongs to. So rows are named by what they are, and not by
their index alone. Of several rows nothing is said rather than something vague: "every ..." names exactly the
rows that are wrong, and "only ..." a small part of all rows that holds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mla.text import listed

# As many runs of numbers are still a pattern: "requests 2, 5..7 and 9".
MAX_RUNS = 3
# "only ...": the part that holds all bad rows is at most this share of the whole.
SMALL_SHARE = 0.5


@dataclass(frozen=True)
class Places:
    """Coordinates of T rows, on the host. Built by `new_tokens`."""

    request: torch.Tensor  # [T] int64
    position: torch.Tensor  # [T] int64, in the request, history included
    first: torch.Tensor  # [T] int64: position of the request's first row
    kv_lens: torch.Tensor  # [B] int64
    slot: torch.Tensor | None = None  # [T] int64: row of the flattened cache
    page_size: int | None = None
    row: torch.Tensor | None = None  # [T] int64: which rows these are; None: all of them

    @classmethod
    def new_tokens(
        cls,
        query_lens: Sequence[int],
        kv_lens: Sequence[int],
        block_table: torch.Tensor | None = None,  # [B, n]
        page_size: int | None = None,
    ) -> Places:
        """Return the places of a step's new tokens; with a block table also those in the cache."""
        counts, keys = torch.tensor(query_lens, dtype=torch.int64), torch.tensor(kv_lens, dtype=torch.int64)
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

    def of(self, rows: torch.Tensor) -> Places:
        """Return the places of some of the rows [n] int64, which keep their numbers."""
        slot = None if self.slot is None else self.slot[rows]
        selected = self.request[rows], self.position[rows], self.first[rows]
        return Places(*selected, self.kv_lens, slot, self.page_size, rows)

    def name(self, row: int, head: int | None = None) -> str:
        """Return "request 3, position 105, head 6 (row 12; page 9, slot 41)"."""
        words = [f"request {int(self.request[row])}", f"position {int(self.position[row])}"]
        words += [] if head is None else [f"head {head}"]
        where = f"row {row if self.row is None else int(self.row[row])}"
        if self.slot is not None and self.page_size:
            page, slot = divmod(int(self.slot[row]), self.page_size)
            where += f"; page {page}, slot {slot}"
        return f"{', '.join(words)} ({where})"

    def sets(self, bad: torch.Tensor) -> Iterator[tuple[torch.Tensor, str]]:
        """Yield sets of rows [T] that may be the bad ones, and their names; the likeliest first."""
        members = _members(bad, self.request)
        if self.slot is not None and self.page_size:
            lengths = self.kv_lens[self.request]
            if int(members.sum()) > 1:
                partial = lengths % self.page_size != 0
                yield partial, "every row of the requests whose last page is not full"
                yield ~partial & (lengths > 0), "every row of the requests whose last page is full"
            last = (lengths - 1) // self.page_size
            yield self.position // self.page_size == last, "every row in the last page of its request"
        few = _few("request", members)
        if few and not bool(members[self.request.unique()].all()):
            yield members[self.request], f"every row of {few}"
        token = self.position - self.first
        for values, text in (
            (self.position, "every row from position {} on"),
            (token, "every row from new token {} of its request on"),
            (torch.arange(len(bad)), "every row from row {} on"),
            (self.slot if self.slot is None else self.slot // (self.page_size or 1), PAGES),
        ):
            if values is not None:
                least = int(values[bad].min())
                yield values >= least, text.format(least)
        of = torch.bincount(self.request)[self.request]
        yield (token == of - 1) & (of > 1), "the last row of every request with several"
        yield (token == 0) & (of > 1), "the first row of every request with several"


PAGES = "every row whose page is {} or beyond"


def name_row(flat: int, shape: Sequence[int], places: Places | None) -> str:
    """Return the name of a row by its flat index among [T] or [T, h]; "row 3, head 5" without places."""
    index = [int(i) for i in torch.unravel_index(torch.tensor(flat), tuple(shape))]
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
    named = name_row(int(bad.flatten().int().argmax()) if worst is None else worst, bad.shape, places)
    common = pattern_of(bad, places)
    return f"{named}; {common}" if common else named


def pattern_of(bad: torch.Tensor, places: Places | None) -> str:
    """Return what all bad rows [T] or [T, h] bool have in common; "" where nothing is clear."""
    bad = bad.detach().cpu()
    if int(bad.sum()) < 2 and bad.numel() > 1:
        return ""  # its name says it all
    if bad.dim() == 1:
        return _rows(bad, places)
    rows, heads = bad.any(1), bad.any(0)
    whole = bool((bad == (rows[:, None] & heads)).all())  # the same heads in every bad row
    if bool(heads.all()):
        return _rows(rows, places) if whole else _part(rows, places)
    named = _few("head", heads)
    if not named:
        return _part(rows, places)
    if whole:
        text = _rows(rows, places)
        return f"{named} of {text}" if text.startswith(("every", "the")) else f"only {named}"
    return f"only {named}" if int(heads.sum()) <= SMALL_SHARE * len(heads) else _part(rows, places)


def _rows(bad: torch.Tensor, places: Places | None) -> str:
    count = int(bad.sum())
    if count == len(bad) > 0:
        return "every row"
    if count < 2:
        return ""
    if places is None:
        first = int(bad.int().argmax())
        return f"every row from row {first} on" if bool(bad[first:].all()) else ""
    return next((text for rows, text in places.sets(bad) if bool((rows == bad).all())), _part(bad, places))


def _part(bad: torch.Tensor, places: Places | None) -> str:
    """Return the few requests that hold all bad rows, "" if there are many, or a single bad row."""
    if places is None:
        return ""
    members = _members(bad, places.request)
    few = _few("request", members)
    small = int(members.sum()) <= SMALL_SHARE * len(members)
    return f"only {few}" if few and small and int(bad.sum()) > 1 else ""


def _members(bad: torch.Tensor, request: torch.Tensor) -> torch.Tensor:
    """Return which requests [B] hold a bad row."""
    return torch.bincount(request[bad], minlength=int(request.max()) + 1) > 0


def _few(what: str, chosen: torch.Tensor) -> str:
    """Return "head 6", "heads 6 and 7" or "requests 2, 5..7 and 9"; "" for none, or for too many runs."""
    numbers, runs = [int(i) for i in chosen.nonzero()[:, 0]], list[list[int]]()
    for number in numbers:  # first and last of every run of consecutive numbers
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    if not 0 < len(runs) <= MAX_RUNS:
        return ""
    words = []
    for first, last in runs:
        words += [f"{first}..{last}"] if last > first + 1 else [str(n) for n in range(first, last + 1)]
    return f"{what}{'s' * (len(numbers) > 1)} {listed(words)}"
