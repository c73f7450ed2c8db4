"""What gives way when a scenario takes too long, and in which order; only forwards advance the clock."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from engine_bench import DECODE, PREFILL, Bench, MakeBench, Parrot

from mla.bench.measure.hooks import Hooks, Shorter
from mla.bench.measure.target import FEWEST, LEFT_OUT, MOST, SECONDS, Target
from mla.bench.measure.variants import EXTRA_PASSES, HEADLINE, Variant, Variants
from mla.bench.plan import yardstick
from mla.bench.workload.scenario import Scenario

BOTH = (HEADLINE, Variant(cache="cold"))
LONG = msgspec.structs.replace(DECODE, runs=4, passes=12, warmups=2)
SHORT = msgspec.structs.replace(PREFILL, runs=20, passes=10, warmups=2)


class Slow(Parrot):
    """Takes a second for each forward."""

    now = 0.0

    def step(self, index: int) -> None:
        Slow.now += 1.0
        super().step(index)


@dataclass
class Ran:
    """What was timed of two implementations; a pass is the number of its forwards."""

    first: list[int]
    cold: list[int]
    cold_reason: str
    other: list[int]
    other_cold: list[int]
    due: list[int | None]
    said: list[str]


def run(
    bench: Bench,
    seconds: float = math.inf,
    most: float = math.inf,
    fewest: float = FEWEST,
    asked: bool = False,
) -> Ran:
    Slow.now, said = 0.0, list[str]()

    def shorten(ms: Mapping[str, float], most: float) -> Shorter:
        return yardstick.shortened(bench.scenario, BOTH, dict.fromkeys(ms, 1e3), most)

    target = Target(seconds, most, fewest, lambda: Slow.now)
    hooks = Hooks(shorten=shorten, say=said.append, target=target)
    parrots = (Slow(bench, "first"), Slow(bench, "other"))
    found = bench.measure(*parrots, variants=Variants(BOTH, asked=asked), hooks=hooks)
    first, other = found["first"], found["other"]
    lengths: list[list[int]] = [
        [len(one) for one in passes]
        for passes in (first.passes, *(one.passes for one in first.others), other.passes)
    ]
    (cold,) = first.others
    other_cold = [len(one) for extra in other.others for one in extra.passes]
    return Ran(
        lengths[0], lengths[1], cold.check.reason, lengths[2], other_cold, [first.due, other.due], said
    )


def test_with_time_enough_nothing_gives_way(make_bench: MakeBench) -> None:
    for seconds, most in ((math.inf, math.inf), (1e4, 2e4)):
        ran = run(make_bench(LONG), seconds, most)
        assert (ran.first, ran.other) == ([4] * 12, [4] * 12)
        assert (ran.cold, ran.other_cold) == ([1] * EXTRA_PASSES if ran.cold[0] == 1 else [4] * 6, ran.cold)
        assert (ran.due, ran.said) == ([None, None], [])


@pytest.mark.parametrize("seconds", [*range(130, 460, 16)])
def test_variants_go_first_then_the_passes_of_others_and_then_those_of_the_first(
    make_bench: MakeBench, seconds: float
) -> None:
    ran = run(make_bench(LONG), seconds)
    shrunk = len(ran.other) * len(set(ran.other)) < 12 or ran.other[0] < 4
    assert not (shrunk and (ran.cold or ran.other_cold)), "a variant was timed for want of passes"
    if len(ran.first) < 12:
        assert shrunk, "the first implementation lost passes before the other"
    assert len(ran.first) >= FEWEST
    assert set(ran.first) == {4}, "passes are whole"
    if not ran.cold:
        assert ran.cold_reason == LEFT_OUT


def test_every_step_of_shrinking_is_met(make_bench: MakeBench) -> None:
    """And the less time there is, the less is run."""
    all_ran = [run(make_bench(LONG), seconds) for seconds in (1000, 245, 200, 160, 140)]
    assert [len(one.first) for one in all_ran] == sorted((len(one.first) for one in all_ran), reverse=True)
    assert [sum(one.other) for one in all_ran] == sorted((sum(one.other) for one in all_ran), reverse=True)
    kept = [(bool(one.cold), sum(one.other) == 48, len(one.first) == 12) for one in all_ran]
    assert kept[0] == (True, True, True)
    assert (False, True, True) in kept
    assert (False, False, True) in kept
    assert kept[-1] == (False, False, False)


def test_a_prefill_keeps_the_forwards_of_its_headline(make_bench: MakeBench) -> None:
    ran = run(make_bench(SHORT), 0.0)
    assert ran.first == [2] * 10
    assert len(ran.other) == FEWEST
    assert ran.due == [None, FEWEST]


@pytest.mark.parametrize("scenario", [LONG, SHORT])
def test_no_pass_begins_that_would_end_too_late_but_each_headline_has_one(
    make_bench: MakeBench, scenario: Scenario
) -> None:
    ran = run(make_bench(scenario), 0.0, 0.0)
    assert (len(ran.first), len(ran.other)) == (1, 1)
    assert ran.due == [1, 1]
    assert (
        f"{scenario.name}, first: 1 of {scenario.rounds} passes fit into the time of a scenario, too few for "
        "an interval; --passes and --runs keep all"
    ) in ran.said
    few = run(make_bench(scenario), 0.0, 60.0)
    assert 1 < len(few.first) < scenario.rounds
    assert few.due[0] == len(few.first)


def test_counts_and_variants_that_the_user_gave_are_run(make_bench: MakeBench) -> None:
    ran = run(make_bench(LONG), 0.0, fewest=math.inf, asked=True)
    assert ran.first == [4] * 12
    assert len(ran.cold) == EXTRA_PASSES
    assert ran.due[0] is None


def test_an_oracle_leaves_half_of_the_time(make_bench: MakeBench) -> None:
    now = 0.0

    def clock() -> float:
        return now

    target = Target(SECONDS, MOST, clock=clock)
    now = 3.0
    target.prepared()
    assert (target.spare(), target.left()) == (SECONDS - 3.0, MOST - 3.0)
    target.checked()
    assert (target.spare(), target.left()) == (SECONDS - 3.0, MOST - 3.0)
    now = 1000.0
    target.prepared()
    assert (target.spare(), target.left()) == (SECONDS / 2, MOST - 1000.0)
    target.checked()
    assert (target.spare(), target.left()) == (SECONDS / 2, MOST / 2)


def test_by_default_there_is_no_limit(decode: Bench) -> None:
    found: Any = Target()
    assert (found.spare(), found.left()) == (math.inf, math.inf)
