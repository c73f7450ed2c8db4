"""The suite without its large cases, for slow ops and for tests of other things."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mla.cases.played import Scene
from mla.conformance.checks import borders
from mla.conformance.checks import ops as reach

NEARER = (reach, "PLACES", (1 << 22,))  # some ops copy what they are given
SMALL = 300_000  # heads of tokens and keys that a scene may have


def size_of(scene: Scene) -> int:
    """Return how many rows, and keys that a loop over them would read, all heads of a scene have."""
    heads = [getattr(case.spec, "num_heads", getattr(case.spec, "groups", 1)) for case in scene.cases]
    lengths = [
        case.rows if not case.entry.prepares else sum(map(int.__mul__, case.query_lens, case.kv_lens))
        for case in scene.cases
    ]
    return sum(map(int.__mul__, heads, lengths))


def make_smaller(monkeypatch: pytest.MonkeyPatch, most: int = SMALL) -> None:
    """Leave out large cases of tables until the test ends, but for the smallest of each check."""
    every = borders.scenes

    def few(name: str, kind: str) -> Iterator[Scene]:
        rows = sorted(every(name, kind), key=size_of)
        yield rows[0]
        yield from (row for row in rows[1:] if size_of(row) <= most)

    monkeypatch.setattr(borders, "scenes", few)
    make_nearer(monkeypatch)


def make_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep caches within 32 bits until the test ends: some ops copy them."""
    monkeypatch.setattr(*NEARER)
