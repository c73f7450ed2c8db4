"""`--op`: every call of a pass is computed, and judged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from opponents.once import ComputedOnce

Play = Callable[..., Any]


@pytest.mark.parametrize(
    ("op", "skips"),
    [
        ("latent_attention", "filled"),
        ("latent_attention", "after 1"),
        ("latent_attention", "after 2"),
        ("latent_attention", "every 5"),
        ("o_proj", "filled"),
        ("o_proj", "every 2"),
        ("expanded_attention", "after 1"),
        ("expanded_attention", "every 5"),
        ("w_uk", "filled"),
        ("rotate_query", "after 2"),
        ("rotate_query", "every 2"),
    ],
)
def test_a_call_that_is_not_computed(play: Play, op: str, skips: str) -> None:
    kind = {"o_proj": "linear", "w_uk": "batched_linear"}.get(op, op)
    opponent = ComputedOnce(kind, skips)
    kv = ("--kv", "60") if op.endswith("attention") else ()
    duel = play(opponent, f"op {op}", "--batch", "8", "--runs", "10", "--passes", "6", *kv)
    assert duel.lost or opponent.hardly_eased, str(duel)
    assert opponent.gains or skips in ("filled", "after 1", "after 2")
