"""A run that takes longer than it should ends with what fits, says so, and is complete with that."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mla.bench import results
from mla.bench.measure import target
from mla.bench.run import scheduler

Bench = Callable[..., Any]


@pytest.fixture
def late(bench: Bench, small: list[str], monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Return a function that runs a decode whose time is over at once."""
    monkeypatch.setattr(scheduler, "TARGET_S", 0.0)
    monkeypatch.setattr(scheduler, "MAX_S", 0.0)
    monkeypatch.setattr(target, "CHEAP_S", 0.0)

    def late(*words: str) -> Any:
        return bench("--backend", "cpu", *small, "--scenario", "decode", "-o", "run.json", *words)

    return late


def passes() -> list[int]:
    return [case.passes for case in results.read(Path("run.json")).cases]


def test_one_pass_is_left_and_why_there_is_no_interval_is_said(late: Bench) -> None:
    done = late("-v")
    assert (done.code, passes()) == (0, [1, 1])
    said = "1 of 6 passes fit into a scenario's time, too few for an interval"
    assert f"decode, mla: {said}; give --passes or --runs to time them all" in done.err
    assert "decode, mla: no time is left for unseen lengths" in done.err
    assert "decode, mla: timed in 1 pass of 4 instead of 6 of 4, too few for an interval" in done.out
    assert "Decode Throughput: " in done.out
    assert "--budget" not in done.err
    (case, _) = results.read(Path("run.json")).cases
    assert case.latency_ms is not None
    assert case.latency_ms.ci95 is None
    assert case.new_lengths is None
    again = late("--resume", "run.json")
    assert "resuming   2 cases of 'run.json' are kept" in again.err


@pytest.mark.parametrize("words", [("--passes", "6"), ("--runs", "4"), ("--budget", "9m")])
def test_what_the_user_gave_is_what_counts(
    late: Bench, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[target.Target] = []

    class Noted(target.Target):
        def __init__(self, seconds: float = math.inf, most: float = math.inf) -> None:
            super().__init__(seconds, most)
            made.append(self)

    monkeypatch.setattr(scheduler, "Target", Noted)
    assert late(*words).code == 0
    assert passes() == [6, 6]
    assert {(target.spare(), target.left()) for target in made} == {(math.inf, math.inf)}, (
        "nothing else gives way"
    )
