"""`--op`: every call of a pass is computed, and judged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from opponents.once import ComputedOnce

Play = Callable[..., Any]


@pytest.mark.parametrize("op", ["latent_attention", "o_proj", "expanded_attention", "w_uk", "rotate_query"])
@pytest.mark.parametrize("skips", ["filled", "after 1", "after 2", "every 2", "every 5"])
def test_a_call_that_is_not_computed(play: Play, op: str, skips: str) -> None:
    kind = {"o_proj": "linear", "w_uk": "batched_linear"}.get(op, op)
    opponent = ComputedOnce(kind, skips)
    kv = ("--kv", "60") if op.endswith("attention") else ()
    duel = play(opponent, f"op {op}", "--batch", "8", "--runs", "10", "--passes", "6", *kv)
    assert duel.lost or not opponent.gains, str(duel)
    assert opponent.gains or skips in ("filled", "after 1", "after 2")
