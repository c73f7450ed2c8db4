"""What gives way when a scenario takes too long, and in which order; only forwards advance the clock."""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec
import pytest
from engine_bench import DECODE, PREFILL, Bench, MakeBench, Parrot

from mla.bench.measure import engine
from mla.bench.measure import target as yardstick
from mla.bench.measure.engine import Hooks
from mla.bench.measure.samples import Measurement
from mla.bench.measure.target import MAX_S, MIN_PASSES, NO_TIME, TARGET_S, Target
from mla.bench.measure.variants import EXTRA_PASSES, HEADLINE, Variant, Variants
from mla.bench.workload.scenario import Scenario

BOTH = (HEADLINE, Variant(cache="cold"))
LONG = msgspec.structs.replace(DECODE, runs=4, passes=12, warmups=2)
SHORT = msgspec.structs.replace(PREFILL, runs=20, passes=10, warmups=2)


class Slow(Parrot):
    """Takes as long for each forward as the script says, which may change after some."""

    now = 0.0
    forwards = 0
    seconds: Callable[[int], float]

    def step(self, index: int) -> None:
        Slow.now += Slow.seconds(Slow.forwards)
        Slow.forwards += 1
        super().step(index)


def a_second(forward: int) -> float:
    return 1.0


def measured(
    bench: Bench,
    *names: str,
    seconds: float = math.inf,
    most: float = math.inf,
    script: Callable[[int], float] = a_second,
    variants: Variants = Variants(),  # noqa: B008  # immutable
    shortened: Callable[..., object] = lambda *given: None,
    said: Callable[[str], None] = lambda line: None,
) -> dict[str, Measurement]:
    """Time these; "first" is the run's first, and `shortened` says what others run that are slow."""
    Slow.now, Slow.forwards, Slow.seconds = 0.0, 0, staticmethod(script)
    hooks = Hooks(target=Target(seconds, most, lambda: Slow.now), first="first")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine, "detail", said)
        patched.setattr(engine, "shortened", shortened)
        return bench.measure(*(Slow(bench, name) for name in names), hooks=hooks, variants=variants)


class Ran:
    """What was timed of two implementations, of which the other is slow; a pass is its number of forwards."""

    def __init__(
        self,
        bench: Bench,
        seconds: float = math.inf,
        most: float = math.inf,
        asked: bool = False,
        script: Callable[[int], float] = a_second,
    ) -> None:
        def slow(
            scenario: Scenario, variants: object, first: float, ms: float, most: float, *_: bool
        ) -> object:
            return yardstick.shortened(scenario, BOTH, 1e3, 1e3, most)

        self.said: list[str] = []
        variants, said = Variants(BOTH, asked=asked), self.said.append
        limits = {"seconds": seconds, "most": most}
        by_name = measured(
            bench, "first", "other", **limits, script=script, variants=variants, shortened=slow, said=said
        )
        first, other = by_name["first"], by_name["other"]
        (cold,) = first.others
        self.first, self.other, self.cold = (
            [len(samples) for samples in passes] for passes in (first.passes, other.passes, cold.passes)
        )
        self.other_cold = [len(samples) for extra in other.others for samples in extra.passes]
        self.cold_reason, self.due = cold.check.reason, [first.due, other.due]


def test_with_time_enough_nothing_gives_way(make_bench: MakeBench) -> None:
    for seconds, most in ((math.inf, math.inf), (1e4, 2e4)):
        ran = Ran(make_bench(LONG), seconds, most)
        assert (ran.first, ran.other) == ([4] * 12, [4] * 12)
        assert (ran.cold, ran.other_cold) == ([1] * EXTRA_PASSES if ran.cold[0] == 1 else [4] * 6, ran.cold)
        assert (ran.due, ran.said) == ([None, None], [])


@pytest.mark.parametrize("seconds", [*range(130, 460, 16)])
def test_variants_go_first_then_the_passes_of_others_and_then_those_of_the_first(
    make_bench: MakeBench, seconds: float
) -> None:
    ran = Ran(make_bench(LONG), seconds)
    shrunk = len(ran.other) * len(set(ran.other)) < 12 or ran.other[0] < 4
    assert not (shrunk and (ran.cold or ran.other_cold)), "a variant was timed for want of passes"
    if len(ran.first) < 12:
        assert shrunk, "the first implementation lost passes before the other"
    assert len(ran.first) >= MIN_PASSES
    assert set(ran.first) == {4}, "passes are whole"
    if not ran.cold:
        assert ran.cold_reason == NO_TIME


def test_no_variant_begins_that_does_not_fit_beside_the_others(make_bench: MakeBench) -> None:
    names, timed = ("first", "second", "third"), []
    for seconds in range(320, 440, 20):
        by_name = measured(make_bench(LONG), *names, seconds=seconds, variants=Variants(BOTH))
        timed.append([len(cold.passes) for name in names for cold in by_name[name].others])
    whole = EXTRA_PASSES
    assert all(set(cold) <= {0, whole} for cold in timed)
    assert [whole, whole, 0] in timed


def test_a_first_forward_that_compiles_for_long_leaves_what_costs_little(make_bench: MakeBench) -> None:
    ran = Ran(make_bench(LONG), TARGET_S, MAX_S, script=lambda number: 0.001 if number else 40.0)
    assert (ran.first, ran.cold) == ([4] * 12, [4] * EXTRA_PASSES)
    assert (ran.other, ran.other_cold) == (ran.first, ran.cold)
    assert (ran.due, ran.said) == ([None, None], [])


def test_a_variant_that_is_cut_is_named(make_bench: MakeBench) -> None:
    """Forwards become slower once it is known to fit."""
    ran = Ran(make_bench(LONG), 600, script=lambda number: 1.0 if number < 120 else 4.0)
    assert 0 < len(ran.cold) < EXTRA_PASSES
    said = f"d, first, cold: {len(ran.cold)} of 6 passes fit into a scenario's time, too few for an interval"
    assert f"{said}; give --passes or --runs to time them all" in ran.said


def test_every_step_of_shrinking_is_met(make_bench: MakeBench) -> None:
    """And the less time there is, the less is run."""
    all_ran = [Ran(make_bench(LONG), seconds) for seconds in (1000, 245, 200, 160, 140)]
    assert [len(ran.first) for ran in all_ran] == sorted((len(ran.first) for ran in all_ran), reverse=True)
    assert [sum(ran.other) for ran in all_ran] == sorted((sum(ran.other) for ran in all_ran), reverse=True)
    kept = [(bool(ran.cold), sum(ran.other) == 48, len(ran.first) == 12) for ran in all_ran]
    assert kept[0] == (True, True, True)
    assert (False, True, True) in kept
    assert (False, False, True) in kept
    assert kept[-1] == (False, False, False)


def test_a_prefill_keeps_the_forwards_of_its_headline(make_bench: MakeBench) -> None:
    ran = Ran(make_bench(SHORT), 0.0)
    assert ran.first == [2] * 10
    assert len(ran.other) == MIN_PASSES
    assert ran.due == [None, MIN_PASSES]


@pytest.mark.parametrize("most", [*range(72, 104, 6)])
@pytest.mark.parametrize(
    ("scenario", "forwards"),
    [
        (msgspec.structs.replace(LONG, runs=8, passes=30), 10),
        (msgspec.structs.replace(SHORT, runs=240, passes=60), 3),
    ],
    ids=["decode", "prefill"],
)
def test_evidence_has_the_time_that_it_takes(
    make_bench: MakeBench, scenario: Scenario, forwards: int, most: float
) -> None:
    """Of a decode 8 forwards on new inputs, of a prefill one; one before, and one on new lengths."""
    first = measured(make_bench(scenario), "first", most=most, script=lambda number: 0.3)["first"]
    assert 1 < len(first.passes) < scenario.rounds
    assert 0 <= most - Slow.now - forwards * 0.3 < 3


@pytest.mark.parametrize("scenario", [LONG, SHORT])
def test_no_pass_begins_that_would_end_too_late_but_each_headline_has_one(
    make_bench: MakeBench, scenario: Scenario
) -> None:
    ran = Ran(make_bench(scenario), 0.0, 0.0)
    assert (len(ran.first), len(ran.other)) == (1, 1)
    assert ran.due == [1, 1]
    assert (
        f"{scenario.name}, first: 1 of {scenario.rounds} passes fit into a scenario's time, too few for "
        "an interval; give --passes or --runs to time them all"
    ) in ran.said
    few = Ran(make_bench(scenario), 0.0, 60.0)
    assert 1 < len(few.first) < scenario.rounds
    assert few.due[0] == len(few.first)


def test_variants_that_the_user_gave_are_run(make_bench: MakeBench) -> None:
    ran = Ran(make_bench(LONG), 0.0, asked=True)
    assert len(ran.cold) == EXTRA_PASSES


def test_an_oracle_leaves_half_of_the_time() -> None:
    now = [0.0]
    target = Target(TARGET_S, MAX_S, clock=lambda: now[0])
    for seconds, left in ((3.0, (TARGET_S - 3.0, MAX_S - 3.0)), (1000.0, (TARGET_S / 2, MAX_S / 2))):
        now[0] = seconds
        target.leave_half()
        assert (target.spare(), target.left()) == left
    assert (Target().spare(), Target().left()) == (math.inf, math.inf), "by default there is no limit"
