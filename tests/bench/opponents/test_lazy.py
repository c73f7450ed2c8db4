"""Every forward and every replay of every pass counts: nobody can know which of them is looked at."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from opponents.graphs import EmptyReplays, FlakyReplays, Graphs
from opponents.lazy import WHEN, Flaky, Lazy, LazySequence

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


GRAPHS = ("--mode", "eager,graph", "--cache", "warm", "--clock", "host")


@pytest.mark.parametrize(
    ("opponent", "scenario"),
    [
        (partial(EmptyReplays, 2), "prefill"),
        (partial(EmptyReplays, 2), "decode"),
        (partial(EmptyReplays, 3, honest=12), "prefill"),
        (partial(EmptyReplays, 1000, honest=20), "decode"),
        (partial(FlakyReplays, 5), "decode"),
        (partial(FlakyReplays, 10), "prefill"),
    ],
    ids=["2, prefill", "2, decode", "3", "the first 20", "1 in 5 spoilt", "1 in 10 spoilt"],
)
def test_a_replay_that_does_nothing_or_not_the_same(
    play: Play, opponent: Callable[..., Graphs], scenario: str
) -> None:
    made = opponent(recorded=scenario == "prefill")
    duel = play(made, scenario, ways=GRAPHS)
    assert made.gains
    assert duel.lost, str(duel)


@pytest.mark.parametrize("scenario", ["prefill", "decode"])
def test_an_honest_replay_keeps_its_number(play: Play, scenario: str) -> None:
    opponent = Graphs(recorded=scenario == "prefill")
    duel = play(opponent, scenario, ways=GRAPHS)
    assert opponent.replays
    assert duel.stands, str(duel)
    (graph,) = duel.case().timings
    assert graph.latency_ms is not None, graph
