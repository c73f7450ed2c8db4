"""Where rows of an output come from: request, position, head, and page and slot of the cache.

A reader looks for a wrong row in the request it belongs to. So rows are named by what they are, and not by
their index alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

# As many runs of numbers are still a pattern: "requests 2, 5..7 and 9".
MOST_RUNS = 3
# "only ...": the part that holds all bad rows is at most this share of the whole.
SMALL = 0.5


@dataclass(frozen=True)
class Coordinates:
    """Of T rows, each [T] int64 on the host; None where it is not known."""

    request: torch.Tensor
    position: torch.Tensor | None = None  # in the request, history included
    token: torch.Tensor | None = None  # index among the request's rows
    kv_len: torch.Tensor | None = None  # of the request
    page: torch.Tensor | None = None  # of the cache, that holds the row's own latent
    page_size: int | None = None


def pattern(bad: torch.Tensor, where: Coordinates) -> str:
    """Return what the bad rows [T] or [T, h] bool have in common; "" where nothing is clear."""
    if int(bad.sum()) < 2 and bad.numel() > 1:
        return ""  # its name says it all
    if bad.dim() == 1:
        return _rows(bad, where)
    rows, heads = bad.any(1), bad.any(0)
    whole = bool((bad == (rows[:, None] & heads)).all())  # the same heads in every bad row
    if bool(heads.all()):
        return _rows(rows, where) if whole else _part(rows, where)
    named = _few("head", heads)
    if not named:
        return _part(rows, where)
    if whole:
        found = _rows(rows, where)
        return f"{named} of {found}" if found.startswith(("every", "the")) else f"only {named}"
    return f"only {named}" if int(heads.sum()) <= SMALL * len(heads) else _part(rows, where)


def _rows(bad: torch.Tensor, where: Coordinates) -> str:
    count = int(bad.sum())
    if count == len(bad) > 0:
        return "every row"
    if count < 2:
        return ""
    for rows, text in _candidates(bad, where):
        if bool((rows == bad).all()):
            return text
    return _part(bad, where)


def _part(bad: torch.Tensor, where: Coordinates) -> str:
    """Return the few requests that hold all bad rows, "" if there are many, or a single bad row."""
    members = _members(bad, where.request)
    few = _few("request", members)
    small = int(members.sum()) <= SMALL * len(members)
    return f"only {few}" if few and small and int(bad.sum()) > 1 else ""


def _candidates(bad: torch.Tensor, where: Coordinates) -> Iterator[tuple[torch.Tensor, str]]:
    """Yield sets of rows that may be the bad ones, and their names; the likeliest first."""
    members = _members(bad, where.request)
    if where.page_size and where.position is not None and where.kv_len is not None:
        if int(members.sum()) > 1:
            partial = where.kv_len % where.page_size != 0
            yield partial, "every row of the requests whose last page is not full"
            yield ~partial & (where.kv_len > 0), "every row of the requests whose last page is full"
        last = (where.kv_len - 1) // where.page_size
        yield where.position // where.page_size == last, "every row in the last page of its request"
    few = _few("request", members)
    if few and not bool(members[where.request.unique()].all()):
        yield members[where.request], f"every row of {few}"
    for values, text in (
        (where.position, "every row from position {} on"),
        (where.token, "every row from new token {} of its request on"),
        (torch.arange(len(bad)), "every row from row {} on"),
        (where.page, "every row whose page is {} or beyond"),
    ):
        if values is not None:
            least = int(values[bad].min())
            yield values >= least, text.format(least)
    if where.token is not None:
        of = torch.bincount(where.request)[where.request]
        yield (where.token == of - 1) & (of > 1), "the last row of every request with several"
        yield (where.token == 0) & (of > 1), "the first row of every request with several"


def _members(bad: torch.Tensor, request: torch.Tensor) -> torch.Tensor:
    """Return which requests [B] hold a bad row."""
    return torch.bincount(request[bad], minlength=int(request.max()) + 1) > 0


def _few(what: str, chosen: torch.Tensor) -> str:
    """Return "head 6", "heads 6 and 7" or "requests 2, 5..7 and 9"; "" for none, or for too many runs."""
    runs = _runs([int(i) for i in chosen.nonzero()[:, 0]])
    if not 0 < len(runs) <= MOST_RUNS:
        return ""
    words = [word for run in runs for word in _words(*run)]
    listed = " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
    return f"{what}{'s' * (int(chosen.sum()) > 1)} {listed}"


def _words(first: int, last: int) -> list[str]:
    return [f"{first}..{last}"] if last > first + 1 else [str(one) for one in range(first, last + 1)]


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first and last of every run of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs


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
