"""What is printed: a table, markdown, CSV and JSON of the same run."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from mla.bench import results
from mla.bench.results.schema import Run
from mla.bench.terminal.run_table import (
    COLUMNS,
    FORMATS,
    comparisons,
    headlines,
    render,
    unreliable_headlines,
)
from mla.bench.terminal.verdict import verdicts
from mla.verify.verdict import Check

MakeRun = Callable[..., Run]

WRONG: dict[str, Any] = {
    "check": Check(status="wrong", reason="1 of 8 output rows hold NaN or infinity"),
    "latency_ms": None,
    "tokens_per_s": None,
    "plan_ms": None,
}
DECODE = {"scenario": "decode", "mode": "decode"}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_ends_with_one_newline(make_run: MakeRun, kind: str) -> None:
    text = render(make_run(), kind)
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


@pytest.mark.parametrize("kind", ["table", "md"])
def test_people_get_the_headlines_last(make_run: MakeRun, kind: str) -> None:
    run = make_run()
    run.cases += make_run(**DECODE).cases
    assert render(run, kind).splitlines()[-2:] == ["Prefill Latency: 2 ms", "Decode Throughput: 4000 tok/s"]


def test_a_scenario_of_another_name_is_named_in_its_headline(make_run: MakeRun) -> None:
    run = make_run(scenario="long")
    run.cases += make_run(scenario="wide", mode="decode").cases
    assert headlines(run) == ["Prefill Latency [long]: 2 ms", "Decode Throughput [wide]: 4000 tok/s"]


def test_the_headline_is_the_first_implementation_even_if_it_is_wrong(make_run: MakeRun) -> None:
    run = make_run(**WRONG)
    run.cases += make_run(implementation="mla-reference").cases
    assert headlines(run) == ["Prefill: no number, check: wrong"]


@pytest.mark.parametrize(
    ("slowest", "latency", "rate"),
    [
        (2.6, "3.1 ms", "2900 tok/s"),  # the intervals are 1.9 ms and 1480 tok/s wide
        (4.9, "unreliable (1.5 .. 4.9 ms)", "unreliable (1600 .. 5300 tok/s)"),
        (276.0, "unreliable (1.5 .. 276.0 ms)", "unreliable (30 .. 5330 tok/s)"),
    ],
)
def test_a_number_with_a_wider_interval_is_no_headline(
    make_run: MakeRun, slowest: float, latency: str, rate: str
) -> None:
    samples = [1.5, 3.1, 3.1, 3.1, 3.1, slowest]
    run = make_run(samples)
    run.cases += make_run(samples, **DECODE).cases
    assert headlines(run) == [f"Prefill Latency: {latency}", f"Decode Throughput: {rate}"]
    wide = [line for line in headlines(run) if "unreliable" in line]
    assert unreliable_headlines(run) == [f"{line}: the interval is wider than the number" for line in wide]
    (case, _) = run.cases
    assert COLUMNS["latency ms"](case) == "3.1", "the table keeps the number"
    only = str(verdicts(make_run(samples))[0])
    assert f"only mla has a number: {latency}" in only
    near = results.Roofline(floor_ms=1.0, fraction=0.5, bound="memory", peak_source="x")
    share = str(verdicts(make_run(samples, roofline=near))[0])
    assert ("at 50 % of the memory limit" in share) is (slowest < 3)


@pytest.mark.parametrize("planned", [None, results.Planned(passes=3, steps=1, due=3)])
def test_a_number_without_an_interval_is_a_headline(make_run: MakeRun, planned: Any) -> None:
    run = make_run([1.0, 2.0, 300.0], planned=planned, scenario="x: unreliable (y")
    assert headlines(run) == ["Prefill Latency [x: unreliable (y]: 2 ms"]
    assert unreliable_headlines(run) == []


@pytest.mark.parametrize("due", [3, 10])
def test_a_headline_of_passes_that_were_cut_says_so(make_run: MakeRun, due: int) -> None:
    """The worse the machine, the fewer the passes: that makes no number surer."""
    few = results.Planned(passes=10, steps=1, due=due)
    near = results.Roofline(floor_ms=1.0, fraction=0.5, bound="memory", peak_source="x")
    run = make_run([1.0, 2.0, 300.0], planned=few, roofline=near)
    assert headlines(run) == ["Prefill Latency: 2 ms (3 of 10 passes, no interval)"]
    assert unreliable_headlines(run) == headlines(run)
    assert [str(one) for one in verdicts(run)] == [
        "prefill: only mla has a number: 2 ms, its share of the limit is unknown"
    ]
    run = make_run([2.0] * 6, planned=few, roofline=near)
    assert (headlines(run), unreliable_headlines(run)) == (["Prefill Latency: 2 ms"], [])


def test_a_share_of_the_limit_is_as_reliable_as_the_headline(make_run: MakeRun) -> None:
    """One pass of a decode stalls: its latency is known, but not its throughput; nor is a sweep's range."""
    near = results.Roofline(floor_ms=1.0, fraction=0.5, bound="memory", peak_source="x")
    samples = [1.0, 1.0, 1.0] * 5 + [1.0, 1.0, 900.0]
    run = make_run(samples, steps_per_pass=3, roofline=near, **DECODE)
    assert "unreliable" in headlines(run)[0]
    assert str(verdicts(run)[0]).endswith("only mla has a number: 1 ms, its share of the limit is unknown")
    run.cases[0].point = {"kv": 16}
    run.cases += make_run([2.0] * 6, point={"kv": 32}, roofline=near, **DECODE).cases
    run.cases[1].scenario, run.cases[1].roofline = "decode 32", msgspec.structs.replace(near, fraction=0.7)
    for case in run.cases:
        case.base = "decode"
    assert str(verdicts(run)[0]).endswith("only mla has numbers; at 70 % of the limit")


@pytest.mark.parametrize("kind", ["table", "md"])
def test_a_wrong_case_shows_its_reason_and_no_number(make_run: MakeRun, kind: str) -> None:
    text = render(make_run(**WRONG), kind)
    row = next(line for line in text.splitlines() if "mla" in line and "wrong" in line)
    cells = row.replace("|", " ").split()
    assert cells == ["prefill", "mla", *["-"] * (len(COLUMNS) - 3), "wrong"]
    assert "\n\nprefill, mla: 1 of 8 output rows hold NaN or infinity\n" in text


def test_a_wrong_row_is_red_on_a_terminal_and_plain_elsewhere(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(**WRONG)
    run.cases += make_run(implementation="mla-reference").cases
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b" not in render(run, "table")
    monkeypatch.setenv("FORCE_COLOR", "1")
    lines = render(run, "table").splitlines()
    wrong, right = (line for line in lines if re.search("prefill(?![,:])", line))
    assert "\x1b[31m" in wrong
    assert "\x1b[31m" not in right


def test_the_table_is_never_cut_however_narrow_the_terminal(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    lines = render(make_run(), "table").splitlines()
    assert all(title in lines[0] for title in COLUMNS)
    assert "…" not in "".join(lines)


def test_markdown_is_one_table_with_as_many_cells_in_each_row(make_run: MakeRun) -> None:
    run = make_run(scenario="a|b")
    rows = [line for line in render(run, "md").splitlines() if line.startswith("| ")]
    assert len(rows) == 3
    assert rows[1] == f"| {' | '.join(['---'] * len(COLUMNS))} |"
    assert {row.replace("\\|", "").count("|") for row in rows} == {len(COLUMNS) + 1}


def test_csv_holds_full_precision_and_survives_any_name(make_run: MakeRun) -> None:
    run = make_run(scenario='a,"b"')
    run.cases[0].latency_ms = results.Latency(
        median=1 / 3, ci95=(0.1, 0.4), p10=0.1, p90=0.5, samples=[1 / 3]
    )
    run.cases += make_run(**WRONG).cases
    right, wrong = csv.DictReader(io.StringIO(render(run, "csv")))
    assert right["scenario"] == 'a,"b"'
    assert float(right["latency_ms"]) == 1 / 3
    assert (right["ci_low_ms"], right["ci_high_ms"]) == ("0.1", "0.4")
    assert (wrong["check"], wrong["latency_ms"], wrong["tokens_per_s"]) == ("wrong", "", "")


def test_json_is_the_result_file(make_run: MakeRun) -> None:
    run = make_run()
    assert results.decode(render(run, "json").encode()) == run


def test_rates_count_the_necessary_work_and_unknown_prints_a_dash(make_run: MakeRun) -> None:
    (case,) = make_run().cases
    cells = {title: cell(case) for title, cell in COLUMNS.items()}
    assert cells["TFLOP/s"] == "0.5"  # 1e9 FLOPs in 2 ms
    assert cells["GB/s"] == "0.5"  # 1e6 bytes in 2 ms
    assert cells["95% CI"] == "-"
    assert cells["% of limit"] == "-"
    assert cells["p10 .. p90"] == "1.2 .. 2.8"


@pytest.mark.parametrize("kind", ["table", "md"])
def test_a_share_that_is_in_doubt_is_no_percentage(make_run: MakeRun, kind: str) -> None:
    doubt = results.Roofline(floor_ms=3.0, bound="compute", peak_source="x", doubt="the limit is in doubt")
    row = next(line for line in render(make_run(roofline=doubt), kind).splitlines() if " 2 " in line)
    assert ">100? com" in row
    near = results.Roofline(floor_ms=1.0, fraction=0.5, bound="memory", peak_source="x")
    assert " 50 mem " in render(make_run(roofline=near), kind)


@pytest.mark.parametrize(
    ("mine", "theirs", "said"),
    [
        ([1.0] * 6, [2.0] * 6, "mla is 2x as fast as other; "),
        ([1.0] * 2, [2.0] * 2, "mla and other: "),
        ([1.0] * 6, [1.0, 2.0, 9.0] * 2, "mla and other: "),  # the intervals touch
        ([1.0] * 6, None, "mla and other: "),
    ],
)
def test_a_ratio_is_told_where_it_is_decided(
    make_run: MakeRun, mine: list[float], theirs: list[float] | None, said: str
) -> None:
    agreement = [results.Agreement(implementation="other", relative_difference=0.1, speed_ratio=2.0)]
    run = make_run(mine, agreement=agreement, ops={"o_proj": "mine"})
    run.cases += make_run(theirs or mine, implementation="other", **({} if theirs else WRONG)).cases
    (line,) = comparisons(run)
    assert line.startswith(f"prefill: {said}outputs differ by 1.0e-01; cache ")
    decided = "is" in said
    assert ("mla won" in str(verdicts(run)[0])) is decided
    assert ("as fast" in line) is decided
