"""A bug that comes and goes is found where it comes, whatever it spoils."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from opponents.flaky import Flaky

Play = Callable[..., Any]


@pytest.mark.parametrize(
    ("bug", "scenario"),
    [
        ({"every": 5}, "prefill"),
        ({"every": 10, "row": 3}, "prefill"),
        ({"every": 10, "row": 3}, "decode"),
        ({"every": 5, "by_chance": True}, "prefill"),
        ({"every": 10, "row": 0, "factor": 1.5}, "decode"),
        ({"every": 30, "row": 7, "factor": -1.0}, "prefill"),
        ({"every": 25, "factor": 0.0, "after": 40}, "decode"),
        ({"every": 10, "row": 2, "factor": float("inf")}, "prefill"),
    ],
    ids=str,
)
def test_a_forward_that_is_spoilt_now_and_then(play: Play, bug: dict[str, Any], scenario: str) -> None:
    opponent = Flaky(**bug)
    duel = play(opponent, scenario)
    assert opponent.gains, "it really spoilt something"
    assert duel.lost, str(duel)
    assert duel.case().check.status == "wrong"


def test_it_is_found_beside_the_reference_which_keeps_its_number(play: Play) -> None:
    duel = play(Flaky(10, row=5), implementations="mla,mla-reference")
    assert duel.lost, str(duel)
    assert duel.case("mla-reference").latency_ms is not None
    assert duel.code == 4
