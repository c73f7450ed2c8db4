"""What wrong rows have in common, where that is clear: a hint at the bug.

Says nothing rather than something vague: "every ..." names exactly the rows that are wrong, and "only ..." a
small part of all rows that holds them.
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
