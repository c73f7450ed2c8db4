"""Graphs: a replay is held to what a call is held to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from opponents.graphs import EmptyReplays, FlakyReplays, Graphs

Play = Callable[..., Any]
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
