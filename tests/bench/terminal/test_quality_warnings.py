"""What is said about numbers that deserve no blind trust."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mla.bench import results
from mla.bench.terminal.quality_warnings import quality_warnings

MakeRun = Callable[..., results.Run]


def latency(**changes: Any) -> results.Latency:
    fields: dict[str, Any] = {"median": 2.0, "ci95": None, "p10": 1.9, "p90": 2.8, "samples": [2.0] * 100}
    return results.Latency(**{**fields, **changes})


def test_a_quiet_machine_needs_no_remark(make_run: MakeRun) -> None:
    assert quality_warnings(make_run(latency_ms=None)) == []
    assert quality_warnings(make_run(latency_ms=latency(drift=0.05, outliers=0), settled=True)) == []
    assert quality_warnings(make_run(latency_ms=latency(drift=-0.05, outliers=1))) == []


def test_a_noisy_machine_is_called_noisy(make_run: MakeRun) -> None:
    (remark,) = quality_warnings(make_run(latency_ms=latency(p10=1.0, p90=2.5)))
    assert remark.startswith("noisy: prefill, mla: p90 is 2.5 times p10; ")
    (coarse,) = quality_warnings(make_run(latency_ms=latency(p10=0.0)))
    assert coarse.startswith("noisy: prefill, mla: p90 is finite and p10 is 0; ")


def test_a_drifting_machine_is_said_to_drift_and_which_way(make_run: MakeRun) -> None:
    (slower,) = quality_warnings(make_run(latency_ms=latency(drift=0.12)))
    assert slower.startswith("drifts: prefill, mla: became 12% slower over its passes; ")
    (faster,) = quality_warnings(make_run(latency_ms=latency(drift=-0.3)))
    assert "became 30% faster" in faster


def test_many_outliers_and_a_single_giant_are_mentioned(make_run: MakeRun) -> None:
    (many,) = quality_warnings(make_run(latency_ms=latency(outliers=2, samples=[2.0] * 98 + [3.0] * 2)))
    assert many.startswith("outliers: prefill, mla: 2 of 100 samples, the slowest 1.5")
    (giant,) = quality_warnings(make_run(latency_ms=latency(outliers=1, samples=[2.0] * 999 + [2000.0])))
    assert "1 of 1000 samples" in giant
    assert "the slowest 1000 times the median" in giant


def test_a_warm_up_that_did_not_settle_is_mentioned(make_run: MakeRun) -> None:
    wrong = results.Check(status="wrong", reason="it is")
    assert quality_warnings(make_run(latency_ms=None, tokens_per_s=None, settled=False, check=wrong)) == []
    (remark,) = quality_warnings(make_run(latency_ms=latency(), settled=False, warmups=110))
    assert remark.startswith(
        "not settled: prefill, mla: latencies still changed after 110 warm-up forwards; "
    )


def test_a_mode_that_was_left_out_is_named_once_with_its_reason(make_run: MakeRun) -> None:
    check = results.Check(status="not run", reason="it waits")
    timings = [
        results.Timing(mode="graph", cache=cache, clock="host", passes=0, check=check, latency_ms=None)
        for cache in ("warm", "cold")
    ]
    assert quality_warnings(make_run(latency_ms=latency(), timings=timings)) == [
        "skipped: graph of prefill, mla: it waits"
    ]
    assert quality_warnings(make_run(latency_ms=latency(), timings=timings, interrupted=True)) == []
    cold = results.Timing(mode="eager", cache="cold", clock="host", passes=0, check=check, latency_ms=None)
    assert quality_warnings(make_run(latency_ms=latency(), timings=[cold, *timings])) == [
        "skipped: cold, graph of prefill, mla: it waits"
    ]


def test_a_case_above_its_limit_is_named_with_the_reason(make_run: MakeRun) -> None:
    roofline = results.Roofline(
        floor_ms=3.0, bound="compute", doubt="the limit or the time is in doubt: 2 ms"
    )
    assert quality_warnings(make_run(latency_ms=latency(p90=2.0), roofline=roofline)) == [
        "above 100 % of its limit: prefill, mla: the limit or the time is in doubt: 2 ms"
    ]
