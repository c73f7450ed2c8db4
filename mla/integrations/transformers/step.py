"""`Step`: what a forward on a stock cache asks of our ops, worked out once for all layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mla.cache.ragged_batch import RaggedBatch, host_ints

PAGE_SIZE = 64

Keys = slice | torch.Tensor


class Span(NamedTuple):
    """Queries of a request of which each sees one key more than the one before."""

    request: int
    first: int
    tokens: int
    kv_len: int  # keys that the last of them sees

    @property
    def queries(self) -> slice:
        """Where they are among the request's."""
        return slice(self.first, self.first + self.tokens)


@dataclass(eq=False)
class Step:
    """The visible keys of each request, spans of queries, and their batch.

    Queries that see no key are in no span.
    """

    flags: torch.Tensor  # [B, 1, 1, s]: kept, so that no other one has its identity
    keys: list[Keys]  # of each request, among s
    spans: list[Span]
    batch: RaggedBatch

    @classmethod
    def of(cls, flags: torch.Tensor, queries: int, device: torch.device) -> Step:
        """Describe a step of so many queries a request, of which the last is that of the last key."""
        seen = flags[:, 0, 0] != 0
        starts = left_padding(seen)
        if starts is None:
            keys: list[Keys] = [row.nonzero().view(-1) for row in seen]
            spans = [span for request, row in enumerate(seen) for span in _spans(request, row, queries)]
        else:
            keys = [slice(start, seen.shape[1]) for start in starts]
            spans = list(left_padded(starts, seen.shape[1], queries))
        width = _pages(max(1, int(seen.sum(dim=1).max())))
        table = torch.arange(seen.shape[0] * width, dtype=torch.int32, device="cpu").view(-1, width)
        rows = table[host_ints(span.request for span in spans)]
        lengths = [span.tokens for span in spans], [span.kv_len for span in spans]
        return cls(flags, keys, spans, RaggedBatch(*lengths, rows, PAGE_SIZE, device))


def left_padding(seen: torch.Tensor) -> list[int] | None:
    """Return the first visible key of each request of seen [B, s]; None where others are hidden, too."""
    starts = seen.shape[1] - seen.sum(dim=1)
    if not torch.equal(seen, torch.arange(seen.shape[1], device="cpu") >= starts[:, None]):
        return None
    found: list[int] = starts.tolist()
    return found


def left_padded(starts: list[int], keys: int, queries: int) -> Iterator[Span]:
    """Yield the spans of requests that see all keys from a first one on; none for a request without keys."""
    for request, start in enumerate(starts):
        if count := min(queries, keys - start):
            yield Span(request, queries - count, count, keys - start)


def _spans(request: int, seen: torch.Tensor, queries: int) -> Iterator[Span]:
    """Yield the spans of a request that sees the keys `seen` [s]: a hidden query is a span of its own."""
    visible = seen[seen.shape[0] - queries :].tolist()
    counts = seen.cumsum(dim=0)[seen.shape[0] - queries :].tolist()
    first = 0
    for query in range(queries):
        ends = query + 1 == queries or not visible[query] or not visible[query + 1]
        if ends:
            if counts[query]:
                yield Span(request, first, query + 1 - first, counts[query])
            first = query + 1


def _pages(tokens: int) -> int:
    """Return pages for so many tokens, in steps of up to an eighth, since they grow with every step."""
    pages = -(-tokens // PAGE_SIZE)
    unit = 1 << max(0, pages.bit_length() - 4)
    return -(-pages // unit) * unit
