"""A bug that comes and goes is found where it comes, whatever it spoils."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from opponents.flaky import Flaky

Play = Callable[..., Any]


@pytest.mark.parametrize("scenario", ["prefill", "decode"])
@pytest.mark.parametrize(
    "bug",
    [
        {"every": 5},
        {"every": 10, "row": 3},
        {"every": 5, "by_chance": True},
        {"every": 10, "row": 0, "factor": 1.5},
        {"every": 30, "row": 7, "factor": -1.0},
        {"every": 25, "factor": 0.0, "after": 40},
        {"every": 10, "row": 2, "factor": float("inf")},
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
