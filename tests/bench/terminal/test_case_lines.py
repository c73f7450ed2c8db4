"""Lines below the table: planning, lengths never seen before, and what tok/s follows from."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from typing import Any

import pytest

from mla.bench import results
from mla.bench.terminal.case_lines import case_lines
from mla.bench.terminal.quality_warnings import quality_warnings
from mla.bench.terminal.run_table import render

MakeRun = Callable[..., results.Run]
STEADY = [1.8, 1.78, 1.82] * 4


def new_lengths(ms: float, repeated: float = 1.8, forwards: int = 20) -> results.NewLengths:
    return results.NewLengths(
        forwards=forwards, ms=ms, repeated_ms=repeated, plan_ms=0.1, repeated_plan_ms=0.09
    )


def test_planning_stands_beside_the_latency_that_leaves_it_out(make_run: MakeRun) -> None:
    assert case_lines(make_run()) == ["prefill, mla: planning 0.1 ms a batch, not in the latency of 2 ms"]
    assert case_lines(make_run(plan_ms=None)) == []
    none: dict[str, Any] = {"latency_ms": None, "tokens_per_s": None}
    assert case_lines(make_run(**none)) == []


@pytest.mark.parametrize("kind", ["table", "md"])
def test_new_lengths_stand_beside_repeated_ones(make_run: MakeRun, kind: str) -> None:
    run = make_run(STEADY, mode="decode", scenario="decode", plan_ms=None, new_lengths=new_lengths(1.85))
    line = "decode, mla: lengths never seen before: 1.85 ms a forward (planning 0.1), repeated 1.8 (0.09)\n"
    assert line in render(run, kind)
    assert quality_warnings(run) == []
    (row,) = csv.DictReader(io.StringIO(render(run, "csv")))
    assert (row["new_lengths_ms"], row["repeated_lengths_ms"]) == ("1.85", "1.8")


def test_a_schedule_that_is_kept_by_lengths_is_warned_about(make_run: MakeRun) -> None:
    (warning,) = quality_warnings(make_run(STEADY, new_lengths=new_lengths(23.6)))
    assert warning == (
        "new lengths: prefill, mla: a forward on lengths never seen before takes 13.1 times as long as on "
        "repeated ones, which a server does not have; the headline is of repeated ones"
    )
    assert len(quality_warnings(make_run(STEADY, new_lengths=new_lengths(2.2)))) == 1


def test_a_small_gap_or_one_within_the_noise_is_none(make_run: MakeRun) -> None:
    assert quality_warnings(make_run(STEADY, new_lengths=new_lengths(2.1))) == [], "1.17 times"
    noisy = [1.2, 1.8, 2.4] * 4
    kinds = [
        {line.partition(":")[0] for line in quality_warnings(make_run(noisy, new_lengths=found))}
        for found in (new_lengths(2.3), new_lengths(2.3, forwards=2000), new_lengths(9.0))
    ]
    assert ["new lengths" in found for found in kinds] == [False, True, True]


def test_throughput_that_does_not_follow_from_the_median_is_explained(make_run: MakeRun) -> None:
    """A step in four takes long: 8 tokens in 3.5 ms on average, where the table shows 1 ms."""
    run = make_run(
        [1.0, 1.0, 1.0, 11.0] * 6, steps_per_pass=4, mode="decode", scenario="decode", plan_ms=None
    )
    assert case_lines(run) == [
        "decode, mla: a forward takes 3.5 ms on average and 1 ms in the median: tok/s follows from the "
        "average"
    ]
    assert render(run, "table").endswith("Decode Throughput: 2286 tok/s\n")
    assert case_lines(make_run(STEADY, plan_ms=None)) == []


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_throughput_and_the_sentence_about_it_follow_from_the_same_samples(
    make_run: MakeRun, mode: str
) -> None:
    """The rates of half of the passes are ten times those of the rest: their median is near neither."""
    samples = [1.56, 18.35, 18.24, 1.85, 1.56, 18.31, 1.6, 40.0]
    run = make_run(samples, mode=mode, scenario=mode, plan_ms=None)
    tokens, mean = sum(run.cases[0].query_lens), sum(samples) / len(samples)
    rate = run.cases[0].tokens_per_s
    assert rate is not None
    assert rate.median == pytest.approx(1e3 * tokens / mean)
    assert case_lines(run) == [
        f"{mode}, mla: a forward takes {mean:.3g} ms on average and 10 ms in the median: tok/s follows from "
        "the average"
    ]


def shortened(mode: str, steps: int) -> dict[str, Any]:
    counts = results.Planned(passes=10, steps=100, due=6)
    return {"mode": mode, "scenario": mode, "plan_ms": None, "steps_per_pass": steps, "planned": counts}


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("prefill", "timed in 6 passes of 2 instead of 10 of 100"),
        (
            "decode",
            "timed in 6 passes of the first 2 instead of 10 of 100; ratios to it are of the same steps",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["table", "md"])
def test_fewer_or_shorter_passes_have_a_column_and_a_line(
    make_run: MakeRun, kind: str, mode: str, said: str
) -> None:
    run = make_run(STEADY, **shortened(mode, 2))
    text = render(run, kind)
    assert f"{mode}, mla: {said}\n" in text
    header, _, row = text.splitlines()[:3]
    assert header.replace("|", " ").split()[-1] == "passes"
    assert row.replace("|", " ").split()[-3:] == ["6", "x", "2"]
    (flat,) = csv.DictReader(io.StringIO(render(run, "csv")))
    counts = ("passes", "steps_per_pass", "planned_passes", "planned_steps")
    assert [flat[name] for name in counts] == ["6", "2", "10", "100"]


def test_a_budget_that_cut_passes_shows_as_well(make_run: MakeRun) -> None:
    run = make_run(STEADY[:6], **shortened("decode", 2))
    run.cases[0].planned = results.Planned(passes=6, steps=2, due=6)
    few = "too few for an interval"
    assert case_lines(run) == [f"decode, mla: timed in 3 passes of 2 instead of 6 of 2, {few}"]


def test_what_ran_as_planned_or_has_no_number_needs_no_column(make_run: MakeRun) -> None:
    planned = results.Planned(passes=6, steps=2, due=6)
    run = make_run(STEADY, steps_per_pass=2, planned=planned)
    for found in (run, make_run(planned=planned, latency_ms=None, tokens_per_s=None), make_run()):
        assert "passes" not in render(found, "table").splitlines()[0]
