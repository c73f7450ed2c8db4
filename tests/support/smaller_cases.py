"""The suite with smaller cases in place of large ones, for slow ops and for tests of other things."""

from __future__ import annotations

import pytest

from mla.conformance import reach
from mla.conformance.checks import attention, small_ops, sparse

NEARER = (reach, "PLACES", (1 << 22,))  # some ops copy what they are given
SMALLER = (
    NEARER,
    (attention, "REQUESTS", (40, 40)),
    (attention, "REQUESTS_OF", (16, 40)),
    (attention, "BEYOND_GRID", (128, 9)),
    (attention, "ROWS", (4, 33, 4)),
    (attention, "FEW_HEADS", (1, 3, 20, 128)),
    (attention, "KEYS", (15, 16, 17, 63, 64, 65, 257, 513)),
    (attention, "RESTS", (129, 130, 192, 255)),
    (attention, "FEW_TOKENS", (1, 2, 15, 16, 17)),
    (attention, "MANY_HEADS", (65, 16)),
    (small_ops, "ROW_COUNTS", (1, 2, 3, 16, 17, 64, 65, 257)),
    (small_ops, "MOST_ROWS", 1031),
    (small_ops, "BEYOND_GRID", 2049),
    (small_ops, "HEADS", (1, 2, 3, 16, 17, 128)),
    (attention, "LONG_CONTEXT", 3000),
    (sparse, "LONG_CONTEXT", 3000),
    (sparse, "CROWDED_KEYS", 1500),
    (sparse, "LARGE_TOPK", 500),
    (sparse, "REQUESTS", 40),
)


def make_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the cases of attention smaller until the test ends."""
    for room, name, value in SMALLER:
        monkeypatch.setattr(room, name, value)


def make_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep caches within 32 bits until the test ends: some ops copy them."""
    monkeypatch.setattr(*NEARER)
