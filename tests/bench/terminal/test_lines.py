"""Lines about cases: details below the table, and warnings about numbers that deserve no blind trust."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mla.bench import results
from mla.bench.results.cases import LEFT_OUT
from mla.bench.terminal.lines import OTHERS, case_lines, folded_warnings, quality_warnings

MakeRun = Callable[..., results.Run]
STEADY = [1.8, 1.78, 1.82] * 4
NOT_RUN = results.Check(status="not run", reason="it waits")


def latency(**changes: Any) -> results.Latency:
    fields: dict[str, Any] = {"median": 2.0, "ci95": None, "p10": 1.9, "p90": 2.8, "samples": [2.0] * 100}
    return results.Latency(**{**fields, **changes})


def unseen(ms: float, forwards: int = 20) -> results.NewLengths:
    return results.NewLengths(forwards=forwards, ms=ms, repeated_ms=1.8, plan_ms=0.1, repeated_plan_ms=0.09)


def kinds(run: results.Run) -> set[str]:
    return {line.partition(":")[0] for line in quality_warnings(run)}


def test_planning_stands_beside_the_latency_that_leaves_it_out(make_run: MakeRun) -> None:
    said = "prefill, mla: planning takes 0.1 ms a batch, not counted in the latency"
    assert case_lines(make_run()) == [said]
    assert case_lines(make_run(plan_ms=None)) == []
    none: dict[str, Any] = {"latency_ms": None, "tokens_per_s": None}
    assert case_lines(make_run(**none)) == []


def test_unseen_lengths_are_a_warning_only_where_they_cost_more_than_noise(make_run: MakeRun) -> None:
    run = make_run(STEADY, plan_ms=None, new_lengths=unseen(1.85))
    said = "prefill, mla: unseen lengths: 1.85 ms a forward (planning 0.1), seen: 1.8 (0.09)"
    assert (case_lines(run), quality_warnings(run)) == ([said], [])
    assert quality_warnings(make_run(STEADY, new_lengths=unseen(2.1))) == [], "1.17 times"
    assert quality_warnings(make_run(STEADY, new_lengths=unseen(23.6))) == [
        "new lengths: prefill, mla: a forward on unseen lengths takes 13.1 times as long as on seen ones, "
        "and a server's are unseen; the headline is of seen ones"
    ]
    assert len(quality_warnings(make_run(STEADY, new_lengths=unseen(2.2)))) == 1
    noisy = [make_run([1.2, 1.8, 2.4] * 4, new_lengths=unseen(*of)) for of in ((2.3,), (2.3, 2000), (9.0,))]
    assert ["new lengths" in kinds(run) for run in noisy] == [False, True, True]


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_throughput_that_does_not_follow_from_the_median_is_explained(make_run: MakeRun, mode: str) -> None:
    """The rates of half of the passes are ten times those of the rest: their median is near neither."""
    samples = [1.56, 18.35, 18.24, 1.85, 1.56, 18.31, 1.6, 40.0]
    run = make_run(samples, mode=mode, scenario=mode, plan_ms=None)
    rate, mean = run.cases[0].tokens_per_s, sum(samples) / len(samples)
    assert rate is not None
    assert rate.median == pytest.approx(1e3 * sum(run.cases[0].query_lens) / mean)
    assert case_lines(run) == [f"{mode}, mla: mean {mean:.3g} ms, median 10 ms (tok/s uses the mean)"]
    assert case_lines(make_run(STEADY, plan_ms=None)) == []


@pytest.mark.parametrize(
    ("mode", "counts", "said"),
    [
        ("prefill", (10, 100, 6), "6 passes of 2 instead of 10 of 100"),
        (
            "decode",
            (10, 100, 6),
            "6 passes of the first 2 instead of 10 of 100; ratios to it are of ",
        ),
        ("decode", (9, 2, 9), "6 passes of 2 instead of 9 of 2"),
    ],
)
def test_fewer_or_shorter_passes_have_a_line(make_run: MakeRun, mode: str, counts: Any, said: str) -> None:
    planned = results.Planned(**dict(zip(("passes", "steps", "due"), counts, strict=True)))
    run = make_run(STEADY, mode=mode, plan_ms=None, steps_per_pass=2, planned=planned)
    (line,) = case_lines(run)
    assert line.startswith(f"prefill, mla: timed in {said}")
    run = make_run(STEADY[:6], mode=mode, plan_ms=None, steps_per_pass=2, planned=planned)
    assert ", too few for an interval" in case_lines(run)[0]


def test_a_quiet_machine_needs_no_remark(make_run: MakeRun) -> None:
    for run in (
        make_run(latency_ms=None),
        make_run(latency_ms=latency(drift=0.05, outliers=0), settled=True),
        make_run(latency_ms=latency(drift=-0.05, outliers=1)),
    ):
        assert quality_warnings(run) == folded_warnings(run) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"p10": 1.0, "p90": 2.5}, "noisy: prefill, mla: p90 is 2.5 times p10; "),
        ({"p10": 0.0}, "noisy: prefill, mla: p90 is finite and p10 is 0; "),
        ({"drift": 0.12}, "drifts: prefill, mla: 12 % slower over its passes; "),
        ({"drift": -0.3}, "drifts: prefill, mla: 30 % faster over its passes; "),
        (
            {"outliers": 2, "samples": [2.0] * 98 + [3.0] * 2},
            "outliers: prefill, mla: 2 of 100 samples, the slowest 1.5 times the median",
        ),
        (
            {"outliers": 1, "samples": [2.0] * 999 + [2000.0]},
            "outliers: prefill, mla: 1 of 1000 samples, the slowest 1000 times the median",
        ),
    ],
)
def test_what_shows_a_busy_machine_is_named(make_run: MakeRun, changes: dict[str, Any], said: str) -> None:
    (line,) = quality_warnings(make_run(latency_ms=latency(**changes)))
    assert line.startswith(said)


def test_a_warm_up_that_did_not_settle_is_mentioned(make_run: MakeRun) -> None:
    wrong = results.Check(status="wrong", reason="it is")
    assert quality_warnings(make_run(latency_ms=None, tokens_per_s=None, settled=False, check=wrong)) == []
    (line,) = quality_warnings(make_run(latency_ms=latency(), settled=False, warmups=110))
    assert line.startswith("not settled: prefill, mla: latencies still changed after 110 warm-up forwards; ")


def test_all_signs_of_a_busy_machine_are_one_warning(make_run: MakeRun) -> None:
    run = make_run(latency_ms=latency(drift=0.12, p10=1.0), settled=False)
    run.cases += make_run(latency_ms=latency(drift=-0.31), implementation="b").cases
    run.cases += make_run(latency_ms=latency(), implementation="c").cases
    assert len(quality_warnings(run)) == 4
    assert folded_warnings(run) == [
        "warning: timings of 2 of 3 cases are unsteady (drift up to 31 %): another load or the device's "
        "clock changed; rerun when idle (-v names the cases)"
    ]
    run.environment[OTHERS] = "1.6 of 2"
    assert folded_warnings(run) == [
        "warning: timings of 2 of 3 cases are unsteady (drift up to 31 %): other processes used 1.6 of 2 "
        "CPUs; rerun when idle (-v names the cases)"
    ]
    run.cases = run.cases[2:]
    assert folded_warnings(run) == ["warning: other processes used 1.6 of 2 CPUs; rerun when idle"]


def test_cases_without_an_interval_for_lack_of_time_are_counted(make_run: MakeRun) -> None:
    planned = results.Planned(passes=6, steps=1, due=3)
    run = make_run(latency_ms=latency(), planned=planned)
    assert folded_warnings(run) == [
        "warning: 1 of 1 cases got too few passes for an interval; give --passes or --runs"
    ]
    run.environment[OTHERS] = "1.6 of 2"
    assert folded_warnings(run) == [
        "warning: 1 of 1 cases got too few passes for an interval: other processes used 1.6 of 2 CPUs; rerun "
        "when idle (-v names the cases)"
    ]
    run.cases[0].settled = False
    both = "timings of 1 of 1 cases are unsteady, 1 of 1 cases got too few passes for an interval: other"
    assert folded_warnings(run)[0].startswith(f"warning: {both}")
    run.cases[0].settled = None
    del run.environment[OTHERS]
    run.cases[0].interrupted = True
    assert folded_warnings(run) == []
    run.cases[0].interrupted = False
    for passes, due in ((3, 3), (6, 6)):  # as the user wants it, or cut by a --budget
        run.cases[0].planned = results.Planned(passes=passes, steps=1, due=due)
        assert folded_warnings(run) == []


def test_a_way_of_timing_that_was_left_out_is_named_once_with_its_reason(make_run: MakeRun) -> None:
    graphs = [
        results.Timing(mode="graph", cache=cache, clock="host", passes=0, check=NOT_RUN, latency_ms=None)
        for cache in ("warm", "cold")
    ]
    cold = results.Timing(mode="eager", cache="cold", clock="host", passes=0, check=NOT_RUN, latency_ms=None)
    run = make_run(latency_ms=latency(), timings=graphs)
    assert quality_warnings(run) == ["skipped: graph of prefill, mla: it waits"]
    run.cases += make_run(latency_ms=latency(), timings=[cold, *graphs], implementation="b").cases
    assert folded_warnings(run) == ["skipped: graph of prefill, mla and 1 more: it waits"]
    assert quality_warnings(run)[1] == "skipped: cold, graph of prefill, b: it waits"
    assert quality_warnings(make_run(latency_ms=latency(), timings=graphs, interrupted=True)) == []


def test_what_nobody_asked_for_and_was_left_out_is_a_detail(make_run: MakeRun) -> None:
    reason = f"{LEFT_OUT}a scenario should end in about 30 s"
    check = results.Check(status="not run", reason=reason)
    cold = results.Timing(mode="eager", cache="cold", clock="host", passes=0, check=check, latency_ms=None)
    run = make_run(latency_ms=latency(), timings=[cold])
    assert quality_warnings(run) == [f"skipped: cold of prefill, mla: {reason}"]
    assert folded_warnings(run) == []


def test_a_case_above_its_limit_is_named_with_the_reason(make_run: MakeRun) -> None:
    roofline = results.Roofline(floor_ms=3.0, bound="compute", doubt="the time is in doubt: 2 ms")
    run = make_run(latency_ms=latency(p90=2.0), roofline=roofline)
    said = ["above 100 % of its limit: prefill, mla: the time is in doubt: 2 ms"]
    assert quality_warnings(run) == folded_warnings(run) == said
