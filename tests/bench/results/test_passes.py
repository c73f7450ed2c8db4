"""Passes of a case: how many there are, and the steps that two cases share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from mla.bench.results import Case, Planned, Run, cases
from mla.bench.results.compare import REFUSED, SAME, SLOWER, Comparison, compare, compare_implementations

MakeRun = Callable[..., Run]

# A decode whose cache grows: 6 passes of 4 steps, and the first 2 of them.
GROWING, FIRST = [1.0, 2.0, 5.0, 6.0] * 6, [10.0, 20.0] * 6


@pytest.fixture
def decode(make_run: MakeRun) -> Callable[..., Run]:
    def decode(samples: list[float], steps: int, planned: int = 4, **changes: Any) -> Run:
        counts = Planned(passes=6, steps=planned, due=6)
        return make_run(samples, mode="decode", steps_per_pass=steps, planned=counts, **changes)

    return decode


def medians(comparison: Comparison) -> tuple[float, ...]:
    return tuple(case.latency_ms.median for case in (comparison.base, comparison.new) if case.latency_ms)


def test_a_ratio_to_a_yardstick_is_of_the_steps_that_it_ran(decode: Callable[..., Run]) -> None:
    (ours,), (slow,) = decode(GROWING, 4).cases, decode(FIRST, 2, implementation="mla-reference").cases
    for pair, value in (((ours, slow), 10.0), ((slow, ours), 0.1)):
        comparison = compare_implementations(*reversed(pair))
        assert comparison.speedup == pytest.approx(value), "by their own medians it would be 15 / 3.5"
        assert comparison.speedup_interval == pytest.approx((value, value))


def test_the_same_steps_have_statistics_of_their_own(decode: Callable[..., Run]) -> None:
    (ours,), (slow,) = decode(GROWING, 4).cases, decode(FIRST, 2).cases
    cut, same, _ = cases.same_steps(ours, slow)
    assert same is slow
    assert cases.passes_of(cut) == [[1.0, 2.0]] * 6
    assert cut.latency_ms is not None
    assert cut.tokens_per_s is not None
    assert (cut.latency_ms.median, cut.latency_ms.ci95) == (1.5, (1.5, 1.5))
    assert cut.tokens_per_s.median == pytest.approx(1e3 * sum(ours.query_lens) * 2 / 3.0)
    assert len(ours.latency_ms.samples) == 24 if ours.latency_ms else False


def test_the_first_of_three_steps_is_in_no_ratio(decode: Callable[..., Run]) -> None:
    """It follows another implementation: by all three, 10 over 1.15 would be 8.7 times."""
    (ours,), (slow,) = decode([1.5, 1.0, 1.0, 9.0] * 6, 4).cases, decode([30.0, 10.0, 10.0] * 6, 3).cases
    cut, other, _ = cases.same_steps(ours, slow)
    assert (cases.passes_of(cut), cases.passes_of(other)) == ([[1.0, 1.0]] * 6, [[10.0, 10.0]] * 6)
    comparison = compare_implementations(slow, ours)
    assert (comparison.speedup, comparison.speedup_interval) == (10.0, (10.0, 10.0))
    (compared,) = compare(decode([1.5, 1.0, 1.0, 9.0] * 6, 4), decode([30.0, 10.0, 10.0] * 6, 3))
    assert (compared.verdict, compared.ratio) == (SLOWER, 10.0)
    assert compared.remarks == "comparing steps 2 to 3 of each pass, present in both"


def test_other_passes_are_compared_whole(decode: Callable[..., Run], make_run: MakeRun) -> None:
    """Those as long, those whose first steps a coarse clock did not see, and a prefill's, which are alike."""
    coarse = decode([0.0, 0.0, 0.0, 6.0] * 6, 4)
    coarse.cases[0].latency_ms.median = 3.0  # type: ignore[union-attr]
    for run, other in (
        (decode(GROWING, 4), decode(GROWING, 4)),
        (coarse, decode([1.0, 2.0, 2.0] * 6, 3)),
        (make_run([3.0, 1.0] * 6, steps_per_pass=2), make_run([4.0] * 6)),
    ):
        assert cases.same_steps(run.cases[0], other.cases[0]) == (run.cases[0], other.cases[0], None)
        (comparison,) = compare(run, other)
        assert comparison.note == ""
        assert "differs" not in comparison.reason


def test_runs_are_compared_by_the_steps_that_both_have(decode: Callable[..., Run]) -> None:
    (comparison,) = compare(decode(GROWING, 4), decode([1.0, 2.0] * 6, 2))
    assert (comparison.verdict, comparison.ratio, medians(comparison)) == (SAME, 1.0, (1.5, 1.5))
    assert comparison.remarks == "comparing steps 1 to 2 of each pass, present in both"
    (comparison,) = compare(decode([1.0, 2.0, 9.0] * 6, 3), decode([2.0, 4.0] * 6, 2))
    assert (comparison.verdict, comparison.ratio) == (SLOWER, 2.0)


def test_passes_that_were_planned_longer_are_another_workload(decode: Callable[..., Run]) -> None:
    """Files that do not say what was planned ran it."""
    old = decode(FIRST, 2, planned=3)
    (comparison,) = compare(decode(FIRST, 2, planned=4), old)
    assert (comparison.verdict, comparison.reason) == (REFUSED, "steps_per_pass differs")
    old.cases[0].planned = None
    assert compare(old, decode(FIRST, 2, planned=2))[0].verdict == SAME
    assert compare(old, decode(FIRST, 2, planned=4))[0].reason == "steps_per_pass differs"
    assert cases.due(old.cases[0], 9) == 9
    assert cases.as_planned(old.cases[0])


def test_it_is_said_where_less_was_run(decode: Callable[..., Run]) -> None:
    case: Case = decode(FIRST, 2).cases[0]
    assert not cases.as_planned(case)
    assert cases.as_planned(decode(GROWING, 4).cases[0])
    assert cases.as_planned(msgspec.structs.replace(case, latency_ms=None, tokens_per_s=None))


@pytest.mark.parametrize("count", [6, 40, 3000])
def test_an_interval_holds_its_own_number(count: int) -> None:
    """Passes of a quick, a slow and a slower step: few of all samples lie near the median of a pass."""
    timed = [[1.0, 2.0 + number / count, 2.5] for number in range(count)]
    timed[::3] = [[0.5, 0.6, 0.7]] * len(timed[::3])
    medians = [sorted(samples)[1] for samples in timed]
    for value in (cases.latency_of(timed), cases.throughput_of(timed, 1)):
        assert value.ci95 is not None
        assert value.ci95[0] <= value.median <= value.ci95[1]
    assert min(medians) <= cases.latency_of(timed).median <= max(medians)
