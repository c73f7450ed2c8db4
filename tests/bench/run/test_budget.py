"""The time of a run and of a scenario: what fits is kept, and what does not is left out and said."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mla.bench import results
from mla.bench.limits.roofline import RooflineModel
from mla.bench.measure import target
from mla.bench.run import scheduler
from mla.bench.run.steering import Steering
from mla.bench.run.watchdog import OVER_BUDGET, Budget
from mla.bench.subjects.fixture import LayerFixture
from mla.bench.subjects.layer import MlaLayer
from mla.bench.workload.scenario import duration, spoken

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


def test_what_does_not_fit_into_what_is_left_is_not_begun() -> None:
    clock = Clock()
    budget = Budget(10, clock)
    assert budget.short(10) == ""
    assert (
        budget.short(10.1) == f"{OVER_BUDGET}: another pass would take about 10 s, and 10 s of 10 s were left"
    )
    clock.now = 4
    assert budget.short(7, "a check").startswith(f"{OVER_BUDGET}: a check would take about 7 s, and 6 s of ")
    clock.now = 10
    assert budget.short(0) == f"{OVER_BUDGET}: 0 s of 10 s were left"
    assert Budget().short(1e30) == "", "without a budget everything fits"


@pytest.fixture
def run_inside(bench: Bench, small: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs a grid within a budget."""
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
    """The clock moves on by a second per look: 5 until the first pass, and one before each of 6 passes."""
    done = run_inside(Budget(11.5, Clock(step=1.0)))
    assert done.code == 0
    cases = results.read(Path("run.json")).cases
    reason = f"{OVER_BUDGET}: 0 s of 12 s were left"
    assert sorted((case.check.status, case.check.reason) for case in cases) == [
        ("not run", reason),
        ("not run", reason),
        ("ok", ""),
    ]
    assert not any(case.interrupted for case in cases)
    assert "--budget skipped 2 of 3 cases; resume with: " in done.error
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
    done = run_inside(Budget(7.5, Clock(step=1.0)), "-a", "batch=1")
    assert done.code == 0
    measured = [case for case in results.read(Path("run.json")).cases if case.latency_ms]
    assert [case.passes for case in measured] == [2]
    assert measured[0].check.status == "ok"
    assert measured[0].latency_ms is not None
    assert len(measured[0].latency_ms.samples) == 2 * 4
    assert "skipped 2 and cut short 1 of 3 cases; " in done.error


def test_a_scenario_without_a_timed_pass_counts_as_left_out(run_inside: Any) -> None:
    done = run_inside(Budget(5.5, Clock(step=1.0)))
    assert done.code == 5
    cases = results.read(Path("run.json")).cases
    assert {case.check.status for case in cases} == {"not run"}
    assert {case.check.reason.partition(": ")[2] for case in cases} == {
        "after the checks, no timed pass fitted into what was left",
        "0 s of 6 s were left",
    }


class Slow(Budget):
    """Takes the first forwards for so many times as long as they are."""

    times = 1e7

    def short(self, seconds: float, what: str = "another pass") -> str:
        return super().short(self.times * seconds if what == "checks and one timed pass" else 0.0, what)


def test_what_the_first_forwards_show_to_be_too_long_is_not_checked(run_inside: Any) -> None:
    done = run_inside(Slow(20, Clock()))
    assert done.code == 5
    for case in results.read(Path("run.json")).cases:
        said = rf"{OVER_BUDGET}: checks and one timed pass would take about .*, and 20 s of 20 s were left"
        assert re.fullmatch(said, case.check.reason)
    assert "--budget was too short for any number (checks and one timed pass would take about " in done.error
    assert "): give it more, or measure less with --runs, " in done.error


def test_a_yardstick_that_does_not_fit_costs_nothing_else(run_inside: Any) -> None:
    class SlowAtFirst(Slow):
        asked = 0

        def short(self, seconds: float, what: str = "another pass") -> str:
            self.asked += what == "checks and one timed pass"
            self.times = 1e7 if self.asked % 2 == 0 else 1.0
            return super().short(seconds, what)

    words = ("-a", "batch=1", "--implementations", "mla,mla-reference")
    assert run_inside(SlowAtFirst(20, Clock()), *words).code == 0
    cases = results.read(Path("run.json")).cases
    assert len(cases) == 6
    for case in cases:
        assert (case.latency_ms is not None) == (case.implementation == "mla")
        assert case.check.reason.startswith(OVER_BUDGET) == (case.implementation == "mla-reference")


@pytest.mark.parametrize(
    ("budget", "done"), [(0.5, ""), (1.5, "limits"), (2.5, "limits oracle"), (3.5, "limits oracle load")]
)
def test_nothing_that_takes_long_begins_once_the_time_is_over(
    run_inside: Any, monkeypatch: pytest.MonkeyPatch, budget: float, done: str
) -> None:
    """The clock moves on by a second per look."""
    log: list[str] = []

    def logged(owner: type, name: str, what: str) -> None:
        method = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given: (log.append(what), method(*given))[1])

    logged(RooflineModel, "known", "limits")
    logged(LayerFixture, "prepare", "oracle")
    logged(MlaLayer, "load", "load")
    assert run_inside(Budget(budget, Clock(step=1.0)), "--implementations", "mla-reference").code == 5
    assert list(dict.fromkeys(log)) == done.split()


def test_a_budget_that_is_over_at_once_runs_nothing(bench: Bench, small: list[str]) -> None:
    done = bench(*VIRTUAL, *small, *GRID, "--budget", "0.001", fakes=["virtual_clock"])
    assert done.code == 5
    assert "--budget was too short for any number (0 s of 0.001 s were left): give it more, or " in done.err
    assert "--budget skipped 3 of 3 cases; with -o, a later run could" in done.err
    assert "is not a valid duration" in bench(*VIRTUAL, "--budget", "soon").err


# ------------------------------------------------------- a scenario's own time


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
