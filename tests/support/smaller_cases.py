"""The suite with smaller cases in place of large ones, for slow ops and for tests of other things."""

from __future__ import annotations

import pytest

from mla.conformance.checks.attention import grid, index, state, tiles
from mla.conformance.problems import reach

NEARER = (reach, "PLACES", (1 << 22,))  # some ops copy what they are given
SMALLER = (
    NEARER,
    (index, "CACHES", ((64, 70), (16, 70), (1, 300))),
    (grid, "REQUESTS", (40, 40)),
    (grid, "REQUESTS_OF", ((16, 40),)),
    (grid, "ROWS", ((4, 33, 4),)),
    (tiles, "FEW_HEADS", (1, 3, 20, 128)),
    (tiles, "LONG", 3000),
    (state, "CALLS", 20),
)


def make_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the cases of attention smaller until the test ends."""
    for room, name, value in SMALLER:
        monkeypatch.setattr(room, name, value)


def make_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep caches within 32 bits until the test ends: some ops copy them."""
    monkeypatch.setattr(*NEARER)
