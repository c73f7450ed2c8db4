"""A budget: what it accepts, when it is over, and what a run inside one keeps."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mla.bench import results
from mla.bench.run import scheduler
from mla.bench.run.budget import Budget, Pace
from mla.bench.run.steering import HANG_AFTER, OVER_BUDGET, Steering
from mla.bench.workload.quantities import duration, rounded_up, spoken

Bench = Callable[..., Any]

VIRTUAL = ("--backend", "fake-virtual-clock")
GRID = ("--scenario", "decode", "-a", "kv=1,2,3")


class Clock:
    """Tells the time that a test sets, and moves on by `step` whenever it is asked."""

    def __init__(self, step: float = 0.0) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400), ("0.5", 0.5), (" 2m ", 120)]
)
def test_durations_have_units(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0m", "-1", "m", "1d", "1e3", "ten", "9" * 400])
def test_anything_else_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="is not a valid duration, such as 90s, 10m or "):
        duration(text)


def test_a_duration_is_spoken_in_the_unit_one_would_choose() -> None:
    assert [spoken(seconds) for seconds in (0.023, 0, 5, 119, 600, 7200)] == [
        "0.02 s",
        "0 s",
        "5 s",
        "119 s",
        "10 min",
        "2.0 h",
    ]


def test_what_does_not_fit_into_what_is_left_does_not_start() -> None:
    clock = Clock()
    budget = Budget(10, clock)
    assert budget.fits(10)
    assert not budget.fits(10.1)
    clock.now = 4
    assert not budget.fits(7)
    clock.now = 10
    assert not budget.fits(0)


def test_estimates_are_corrected_by_what_earlier_scenarios_took() -> None:
    budget = Budget(10, Clock())
    budget.learn(1, 4)
    budget.learn(1, 2)
    assert budget.corrected(2) == 6
    assert budget.fits(3)
    assert not budget.fits(4)


def test_without_a_budget_everything_fits() -> None:
    assert Budget().fits(1e30)
    assert not Pace(Budget(), 1e30).over()


def test_passes_stop_by_the_estimate_until_one_has_been_timed() -> None:
    clock = Clock()
    assert Pace(Budget(10, clock), 10.1).over()
    pace = Pace(Budget(10, clock), 5)
    assert not pace.over()
    clock.now = 7  # it was estimated to take less
    assert pace.over()
    pace = Pace(Budget(10, clock), 9)
    assert not pace.over()
    clock.now = 8  # and here it takes 1, so that 8 more fit into the 9 that are left
    assert not pace.over()
    clock.now = 15.9
    pace.restart()
    assert not pace.over()
    clock.now = 16.1
    assert pace.over()


@pytest.fixture
def run_inside(bench: Bench, small: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs a grid within a budget; each scenario is estimated at half a second."""
    monkeypatch.setattr("mla.bench.plan.estimate.Estimator.seconds", lambda *_: 0.5)
    monkeypatch.setattr("mla.bench.plan.estimate.Estimator.least", lambda *_: 0.4)
    monkeypatch.setattr("mla.bench.plan.estimate.Estimator.forward", lambda self, scenario, name: 0.0)
    measure = scheduler.measure

    def run_inside(budget: Budget, *words: str) -> Any:
        def steered(request: Any, run: results.Run, steering: Steering) -> Any:
            return measure(request, run, replace(steering, budget=budget))

        options = ("--budget", "9m", "-o", "run.json", *words)
        with monkeypatch.context() as patched:
            patched.setattr(scheduler, "measure", steered)
            return bench(*VIRTUAL, *small, *GRID, *options, fakes=["virtual_clock"])

    return run_inside


def test_scenarios_that_do_not_fit_are_left_out_and_the_note_says_how_to_go_on(
    run_inside: Any, bench: Bench
) -> None:
    class Shrinking(Budget):
        def learn(self, estimate: float, taken: float) -> None:
            self._end = 0.3  # less than the least of another scenario

    done = run_inside(Shrinking(2, Clock()))
    assert done.code == 0
    cases = results.read(Path("run.json")).cases
    reason = f"{OVER_BUDGET}: checks and one timed pass would take about 0.4 s, and 0.3 s of 2 s were left"
    assert sorted((case.check.status, case.check.reason) for case in cases) == [
        ("not run", reason),
        ("not run", reason),
        ("ok", ""),
    ]
    assert not any(case.interrupted for case in cases)
    assert "--budget skipped 2 of 3 cases and cut short 0; the whole run fits into about " in done.error
    words = shlex.split(done.error.partition("python -m mla.bench ")[2])
    assert bench(*words).code == 0
    after = results.read(Path("run.json")).cases
    assert [case.check.status for case in after] == ["ok"] * 3
    kept = next(case for case in cases if case.latency_ms)
    again = next(case for case in after if case.scenario == kept.scenario)
    assert again == msgspec.structs.replace(kept, roofline=again.roofline), (
        "the highest limit of both runs counts"
    )


def test_passes_stop_at_the_deadline_and_what_was_measured_is_kept_and_checked(run_inside: Any) -> None:
    """The clock moves on by a second whenever it is read: three times to start, and before every pass.

    So a pass takes a second, and with half of one left there is no third.
    """
    done = run_inside(Budget(5.5, Clock(step=1.0)), "-a", "batch=1")
    assert done.code == 0
    measured = [case for case in results.read(Path("run.json")).cases if case.latency_ms]
    assert [case.passes for case in measured] == [2]
    assert measured[0].check.status == "ok"
    assert measured[0].latency_ms is not None
    assert len(measured[0].latency_ms.samples) == 2 * 4
    assert "skipped 2 of 3 cases and cut short 1; " in done.error


def test_a_scenario_without_a_timed_pass_counts_as_left_out(run_inside: Any) -> None:
    done = run_inside(Budget(2.7, Clock(step=1.0)))
    assert done.code == 5
    cases = results.read(Path("run.json")).cases
    assert {case.check.status for case in cases} == {"not run"}
    assert {case.check.reason.partition(": ")[2] for case in cases} == {
        "after the checks, no timed pass fitted into what was left",
        "checks and one timed pass would take about 0.4 s, and 0 s of 3 s were left",
    }


def test_a_scenario_that_fits_in_part_is_cut_short_and_not_left_out(
    run_inside: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("mla.bench.plan.estimate.Estimator.seconds", lambda *_: 1e6)
    done = run_inside(Budget(5.5, Clock(step=1.0)))
    assert done.code == 0
    assert [case.passes for case in results.read(Path("run.json")).cases if case.latency_ms] == [2]


def test_a_budget_that_is_over_at_once_runs_nothing(bench: Bench, small: list[str]) -> None:
    done = bench(*VIRTUAL, *small, *GRID, "--budget", "0.001", fakes=["virtual_clock"])
    assert done.code == 5
    assert "--budget was too short for any number (checks and one timed pass would take about " in done.err
    assert re.search(
        r" s, and 0 s of 0\.001 s were left\): the whole run fits into about [\d.]+ s, so give it "
        r"as much, or measure less with --runs, ",
        done.err,
    )
    assert "--budget skipped 3 of 3 cases and cut short 0; with -o, a later run could" in done.err
    assert "is not a valid duration" in bench(*VIRTUAL, "--budget", "soon").err


def test_where_yardsticks_do_not_fit_the_first_implementation_runs_alone(
    run_inside: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each implementation takes 3 s to have a number; with 5 s left there is room for one."""

    class Stubborn(Budget):
        def learn(self, estimate: float, taken: float) -> None:
            pass

    monkeypatch.setattr(
        "mla.bench.plan.estimate.Estimator.least", lambda self, scenario, names, first: 3.0 * len(names)
    )
    done = run_inside(Stubborn(5, Clock()), "-a", "batch=1", "--implementations", "mla,mla-reference")
    assert done.code == 0
    cases = results.read(Path("run.json")).cases
    reason = f"{OVER_BUDGET}: checks and one timed pass would take about 6 s, and 5 s of 5 s were left"
    for case in cases:
        if case.implementation == "mla":
            assert case.latency_ms is not None
        else:
            assert (case.check.status, case.check.reason) == ("not run", reason)
    assert len(cases) == 6


def test_a_run_that_was_cut_says_what_all_of_it_takes(run_inside: Any) -> None:
    """4 s have passed when scenarios begin, three of half a second each, and with limits of 4 s."""
    clock = Clock()
    budget = Budget(4.2, clock)
    clock.now = 4.0
    done = run_inside(budget)
    assert done.code == 5
    assert (
        "and 0.2 s of 4 s were left): the whole run fits into about 25 s, so give it as much, or "
        in done.error
    )


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.1, "5 s"), (5, "5 s"), (111, "115 s"), (116, "2 min"), (150, "3 min")]
)
def test_what_is_needed_is_rounded_up_and_spoken_in_full(seconds: float, said: str) -> None:
    assert spoken(rounded_up(seconds)) == said
    assert spoken(rounded_up(7150)) == "2.0 h"
    assert spoken(rounded_up(7201)) == "2.1 h"


def test_by_default_nothing_ends_a_run_early() -> None:
    assert Steering().budget.left() == float("inf")
    assert Steering().hang_after == HANG_AFTER == duration("10m")
