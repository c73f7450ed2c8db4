"""What is printed: a first look, every detail, Markdown, CSV and JSON of the same run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mla.bench import results
from mla.bench.results.rows import case_rows
from mla.bench.results.schema import RankFacts, Run, Spread
from mla.bench.terminal.run_table import (
    COLUMNS,
    FORMATS,
    columns,
    headlines,
    render,
    unreliable_headlines,
)
from mla.bench.terminal.verdict import verdicts
from mla.verify.verdict import Check

MakeRun = Callable[..., Run]
GOLDEN = Path(__file__).parents[2] / "golden"

NO_NUMBER: dict[str, Any] = {"latency_ms": None, "tokens_per_s": None, "plan_ms": None}
WRONG = {"check": Check(status="wrong", reason="1 of 8 output rows hold NaN or infinity"), **NO_NUMBER}
DECODE = {"scenario": "decode", "mode": "decode"}
REFERENCE = {"implementation": "mla-reference", "ops": {"latent_attention": "plain"}}
HINT = "-v shows details, -o run.json saves the run, --batch-spec 16q1s4k times your own batch"


def hold(name: str, text: str) -> None:
    """Assert that `text` is what a file of `tests/golden` keeps; with UPDATE_GOLDEN=1, keep it instead."""
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text(), f"UPDATE_GOLDEN=1 keeps the new {name}"


@pytest.fixture(autouse=True)
def _not_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


def limit(share: float, bound: str = "compute") -> results.Roofline:
    return results.Roofline(floor_ms=1.0, fraction=share, bound=bound, peak_source="measured")  # type: ignore[arg-type]


@pytest.fixture
def first(make_run: MakeRun) -> Run:
    """Return a run of two scenarios by two implementations, as a first run has."""

    def passes(ms: float) -> list[float]:
        return [ms * (1 + step / 100) for step in range(6)]

    run = make_run(passes(62.0), roofline=limit(0.84))
    run.cases += make_run(passes(93.2), roofline=limit(0.56), **REFERENCE).cases
    run.cases += make_run(passes(2.19), roofline=limit(0.59, "memory"), **DECODE).cases
    run.cases += make_run(passes(8.62), roofline=limit(0.15, "memory"), **DECODE, **REFERENCE).cases
    run.config["name"] = "deepseek-v2-lite"
    run.environment = {"mla": "0.2.0", "torch": "2.13.0", "torch_threads": "2", "processor": "a CPU"}
    run.ceilings = [
        results.Ceiling(work="read", value=6.9e10, source="measured: sum", footprint_bytes=30 << 20),
        results.Ceiling(work="read", value=1.13e11, source="measured: sum", footprint_bytes=32 << 20),
        results.Ceiling(work="matmul", value=4.4e11, source="measured: mine", dtype="bfloat16", ours=True),
    ]
    return run


@pytest.mark.parametrize(("columns", "kept"), [("", 100), ("0", 100), ("80", 80), ("60", 66)])
def test_a_first_look_fits(first: Run, monkeypatch: pytest.MonkeyPatch, columns: str, kept: int) -> None:
    """Extras go where the terminal is narrow, and never a number."""
    monkeypatch.setenv("COLUMNS", columns)
    text = render(first, "table", "short", HINT)
    hold(f"run-{int(columns or 0) or 100}.txt", text)
    assert len(text.splitlines()) <= 26
    assert all(len(line) <= kept for line in text.splitlines())


def test_what_has_no_number_is_a_row_with_a_word_a_reason_and_what_to_do(
    first: Run, make_run: MakeRun
) -> None:
    states = {"wrong": WRONG["check"].reason, "doubtful": "it synchronizes early", "not run": "no memory."}
    for status, reason in states.items():
        check = Check(status=status, reason=reason)  # type: ignore[arg-type]
        first.cases += make_run(implementation=f"mla[{status[:3]}]", check=check, **NO_NUMBER).cases
    first.cases += make_run(implementation="late", interrupted=True, **NO_NUMBER).cases
    hold("run-without-numbers.txt", render(first, "table"))


def test_no_ratio_is_printed_where_there_is_no_decision(make_run: MakeRun) -> None:
    run = make_run([1.0, 2.0, 9.0] * 2)
    run.cases += make_run([1.1, 2.0, 9.0] * 2, **REFERENCE).cases
    text = render(run, "table")
    assert re.search(r"mla .* undecided$", text, re.MULTILINE)
    assert not re.search(r"\dx", text + "".join(map(str, verdicts(run))))


def test_an_op_has_the_rate_of_what_limits_it_in_a_unit_that_fits(make_run: MakeRun) -> None:
    changes = {"op": "o_proj", "cost": results.Cost(flops=10**7, bytes=10**6)}
    for bound, rate in (("compute", "5 GFLOP/s"), ("memory", "500 MB/s")):
        assert f" {rate} " in render(make_run(roofline=limit(0.5, bound), **changes), "table")


def test_a_sweep_has_a_line_that_counts_its_points(make_run: MakeRun) -> None:
    run = make_run()
    run.cases = [
        case
        for kv, ms in ((4, 1.0), (8, 2.0))
        for name, factor in (("mla", 1.0), ("mla-reference", 2.0))
        for case in make_run(
            [ms * factor] * 6,
            scenario=f"s kv={kv}",
            base="s",
            point={"kv": kv},
            implementation=name,
            ops={"o_proj": name},
        ).cases
    ]
    assert "\ns (2 points): mla is fastest at 2; 2x as fast as the next\n" in render(run, "table")


def test_quiet_prints_the_headlines_alone(first: Run) -> None:
    assert render(first, "table", "quiet") == "Prefill Latency: 64 ms\nDecode Throughput: 3560 tok/s\n"


@pytest.mark.parametrize("kind", ["table", "md"])
def test_every_detail(first: Run, kind: str) -> None:
    agreement = results.Agreement(implementation="mla", relative_difference=0.1, speed_ratio=0.67)
    first.cases[1].agreement = [agreement]
    first.cases[3].planned = results.Planned(passes=10, steps=1, due=6)
    hold(f"run-verbose-{kind}.txt", render(first, kind, "verbose"))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_ends_with_one_newline(make_run: MakeRun, kind: str) -> None:
    text = render(make_run(), kind)
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


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
    assert unreliable_headlines(run) == wide
    assert COLUMNS["latency ms"](case_rows(run)[0]) == "3.1", "the table keeps the number"
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
    assert [str(verdict) for verdict in verdicts(run)] == [
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


def test_a_wrong_row_is_red_on_a_terminal_and_plain_elsewhere(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(**WRONG)
    run.cases += make_run(implementation="mla-reference").cases
    assert "\x1b" not in render(run, "table")
    monkeypatch.setenv("FORCE_COLOR", "1")
    wrong, right = (line for line in render(run, "table").splitlines() if re.search("prefill(?![,:])", line))
    assert "\x1b[31m" in wrong
    assert "\x1b[31m" not in right


def test_markdown_is_one_table_with_as_many_cells_in_each_row(make_run: MakeRun) -> None:
    run = make_run(scenario="a|b")
    rows = [line for line in render(run, "md").splitlines() if line.startswith("| ")]
    assert len(rows) == 3
    shown = columns(run.cases)
    assert rows[1] == f"| {' | '.join(['---'] * len(shown))} |"
    assert {row.replace("\\|", "").count("|") for row in rows} == {len(shown) + 1}
    run.cases = []
    assert render(run, "md").startswith("| scenario | implementation |")


def test_json_is_the_result_file_without_the_word_for_readers(make_run: MakeRun) -> None:
    rank = RankFacts(
        rank=0, samples=[1.0], collective_ms=0, collective_bytes=0, cache_bytes=1, weight_bytes=1
    )
    run = make_run(spread=Spread(layout="tp=1", library="gloo", ranks=[rank], predicted=True))
    assert results.decode(render(run, "json").encode()) == run
    assert "mla (predicted)" in render(run, "table")


def test_rates_count_the_necessary_work_and_unknown_prints_a_dash(make_run: MakeRun) -> None:
    (row,) = case_rows(make_run())
    cells = {title: cell(row) for title, cell in COLUMNS.items()}
    assert cells["FLOP/s"] == "500 G"  # 1e9 FLOPs in 2 ms
    assert cells["GB/s"] == "0.5"  # 1e6 bytes in 2 ms
    assert cells["95% CI"] == cells["% of limit"] == "-"
    assert cells["p10 .. p90"] == "1.2 .. 2.8"


def test_outputs_and_memory_have_columns(make_run: MakeRun) -> None:
    agreement = [results.Agreement(implementation="mla", relative_difference=0.1, speed_ratio=0.5)]
    run = make_run([1.0] * 6)
    run.cases += make_run([2.0] * 6, implementation="other", agreement=agreement).cases
    shown = columns(run.cases)
    rows = case_rows(run)
    assert [shown["difference"](row) for row in rows] == ["-", "1.0e-01"]
    assert [shown[name](rows[0]) for name in ("cache", "transient")] == ["0.0195 KiB", "-"]
    assert "difference" not in columns(make_run().cases)
