"""A number far above the device's limits is withheld, once the limits were measured again; others stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from mla.bench import results
from mla.bench.limits import roofline
from mla.bench.limits.microbench import Microbenchmark
from mla.bench.limits.roofline import RooflineModel
from mla.bench.results.schema import Ceiling, Cost, NewLengths, Roofline, Stage, Timing
from mla.bench.run import scenario_run

COST = Cost(flops=10, bytes=10)
Case = Callable[..., results.Case]


class Limits:
    """Limits above which a case lies until they were measured so many times again."""

    def __init__(self, right_after: int, above: bool = False) -> None:
        self.left, self.above_limit, self.asked = right_after, above, 0

    def above(self, cost: Cost, latency_ms: float) -> bool:
        assert cost == COST
        return self.above_limit

    def implausible(self, cost: Cost, latency_ms: float) -> str:
        return "it cannot be" if self.left > 0 else ""

    def again(self, times: int) -> None:
        self.asked += 1
        self.left -= 1


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(scenario_run.time, "sleep", slept.append)
    return slept


def judge(case: results.Case, limits: Limits) -> None:
    scenario_run.judge(case, COST, cast("RooflineModel", limits))


def test_a_case_within_its_limits_costs_no_further_measurement(case: Case) -> None:
    judged_case, limits = case(), Limits(0)
    judge(judged_case, limits)
    assert (limits.asked, judged_case) == (0, case())


def test_a_case_a_little_above_its_limit_keeps_its_number_and_has_the_limit_measured_again(
    case: Case,
) -> None:
    judged_case, limits = case(), Limits(0, above=True)
    judge(judged_case, limits)
    assert (limits.asked, judged_case) == (1, case())


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_limit_that_another_load_had_lowered_costs_no_number(
    case: Case, waits: list[float], times: int
) -> None:
    judged_case, limits = case(), Limits(times, above=True)
    judge(judged_case, limits)
    assert (limits.asked, judged_case) == (times, case())
    assert len(waits) == times - 1


def test_a_number_that_stays_far_above_its_limit_is_withheld(case: Case, waits: list[float]) -> None:
    check = results.Check(status="ok", error_ratio=0.5, relative_error=1e-3)
    latency = results.Latency(median=1.0, ci95=None, p10=1.0, p90=1.0, samples=[1.0])
    timings = [
        Timing(mode="eager", cache=cache, clock="host", passes=passes, check=check, latency_ms=kept)
        for cache, passes, kept in (("cold", 3, latency), ("warm", 0, None))
    ]
    lengths = NewLengths(forwards=1, ms=1.0, repeated_ms=1.0, plan_ms=1.0, repeated_plan_ms=1.0)
    judged_case = case(
        timings=timings, stages=[Stage(name="a", ms=1.0)], launch_bound=True, new_lengths=lengths
    )
    judge(judged_case, Limits(99, above=True))
    assert sum(waits) >= 3, "a load comes and goes in seconds"
    assert judged_case.check == results.Check(
        status="doubtful", error_ratio=0.5, relative_error=1e-3, reason="it cannot be"
    )
    assert (
        judged_case.latency_ms,
        judged_case.tokens_per_s,
        judged_case.plan_ms,
        judged_case.launch_bound,
    ) == (None, None, None, None)
    assert (judged_case.roofline, judged_case.stages, judged_case.switch_steps, judged_case.passes) == (
        Roofline(),
        [],
        [],
        0,
    )
    assert judged_case.new_lengths is None
    assert (timings[0].latency_ms, timings[0].check.status, timings[0].passes) == (None, "doubtful", 0)
    assert timings[1].check == check
    assert results.decode(results.encode(results_run(judged_case))).cases == [judged_case]


def results_run(result: results.Case) -> results.Run:
    facts = results.BackendFacts(name="x", version=None, device="y", memory_bytes=None, cache_bytes=None)
    return results.Run(
        schema_version=results.SCHEMA_VERSION,
        argv=[],
        created="",
        git_commit=None,
        backend=facts,
        environment={},
        config={},
        dtype="bfloat16",
        attention="auto",
        page_size=64,
        seed=0,
        cases=[result],
    )


@pytest.mark.parametrize("rate", [1.0, 1e5])
def test_a_run_withholds_what_no_device_can_do(
    bench: Any, small: list[str], monkeypatch: pytest.MonkeyPatch, rate: float
) -> None:
    """Limits so low that any time is far below its floor stand for times that are too short."""

    def read(self: Microbenchmark, size: int) -> Ceiling:
        return Ceiling(work="read", value=rate, source="measured: x", footprint_bytes=size)

    monkeypatch.setattr(roofline, "_MEASURED", {})
    monkeypatch.setattr(Microbenchmark, "read", read)
    done = bench("--backend", "cpu", *small, "--scenario", "decode", "--format", "json")
    (first, *others) = results.decode(done.out.encode()).cases
    for case in (first, *others):
        assert (case.check.status, case.latency_ms, case.roofline) == ("doubtful", None, Roofline())
        assert "measured: x" in case.check.reason
    assert [agreement.speed_ratio for agreement in first.agreement] == [None] * len(others)


def test_the_cost_that_is_judged_is_that_of_the_cheaper_path(
    bench: Any, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--attention expanded` counts more FLOPs than an implementation needs."""
    judged: dict[str, list[int]] = {}
    for attention in ("auto", "expanded"):
        least_flops = judged.setdefault(attention, [])
        monkeypatch.setattr(
            scenario_run, "judge", lambda case, least, limits, flops=least_flops: flops.append(least.flops)
        )
        bench("--backend", "cpu", *small, "--scenario", "decode", "--attention", attention)
    assert judged["auto"] == judged["expanded"]
