"""A buffer that holds a result is no reason not to compute it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from opponents.filled import LOOKS, SkipsFilled

Play = Callable[..., Any]


@pytest.mark.parametrize(
    ("what", "look"),
    [*(("forward", look) for look in LOOKS), ("o_proj", "its last number"), ("o_proj", "anything but zero")],
)
def test_an_output_that_is_filled_is_not_left_alone(play: Play, what: str, look: str) -> None:
    """Outputs hold NaN before every forward: none is found filled, or what was left alone is wrong."""
    opponent = SkipsFilled(what, look)
    duel = play(opponent, "prefill")
    assert duel.lost or opponent.hardly_eased, str(duel)


@pytest.mark.parametrize(("what", "scenario"), [("scratch", "prefill"), ("all", "decode")])
def test_scratch_of_an_earlier_forward_is_no_result_of_this_one(play: Play, what: str, scenario: str) -> None:
    opponent = SkipsFilled(what)
    duel = play(opponent, scenario)
    assert opponent.gains
    assert duel.lost, str(duel)
