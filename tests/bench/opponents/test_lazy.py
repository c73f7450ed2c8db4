"""Every forward of every pass counts: nobody can know which of them is looked at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from opponents.lazy import WHEN, Lazy, LazySequence

Play = Callable[..., Any]
# Like others that are tried.
SAME = ("pass 1 of 5", "pass 3 of 5", "pass 4 of 5")
# What these look at is the same in every forward: they compute all of them, or lose.
TELLTALES = ("collector on", "collector off")


@pytest.mark.parametrize("when", [when for when in WHEN if when not in (*TELLTALES, *SAME)])
def test_work_that_is_left_out_now_and_then(play: Play, when: str) -> None:
    opponent = Lazy(when)
    duel = play(opponent)
    assert opponent.gains, "it really left something out"
    assert duel.lost, str(duel)


@pytest.mark.parametrize("when", TELLTALES)
def test_nothing_tells_a_forward_that_is_looked_at_from_another(play: Play, when: str) -> None:
    opponent = Lazy(when)
    duel = play(opponent)
    assert duel.lost or opponent.hardly_eased, str(duel)


@pytest.mark.parametrize("when", ["pass 1 of 5", "every 3rd step", "40 forwards"])
def test_work_that_is_left_out_of_a_prefill(play: Play, when: str) -> None:
    opponent = Lazy(when)
    duel = play(opponent, "prefill")
    assert opponent.gains
    assert duel.lost, str(duel)


@pytest.mark.parametrize(
    ("instead", "when"),
    [
        ("no attention", "pass 0 of 5"),
        ("attention 1 % off", "4 of 5 passes"),
        ("attention in bfloat16", "4 of 5 passes"),
        ("attention in float16", "all forwards but two of 40"),
    ],
)
def test_work_that_is_done_less_precisely(play: Play, instead: str, when: str) -> None:
    opponent = Lazy(when, instead)
    duel = play(opponent)
    assert opponent.gains
    assert duel.lost, str(duel)


@pytest.mark.parametrize("every", [2, 7])
def test_a_repeated_forward_in_one_call_that_does_nothing(play: Play, every: int) -> None:
    opponent = LazySequence(every)
    duel = play(opponent, "prefill")
    assert opponent.gains
    assert duel.lost, str(duel)
