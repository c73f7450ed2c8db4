"""The flat row of a case, as CSV files hold it (RFC 4180).

`export` writes a row per way of timing, `--format csv` a row per case; no number that was withheld.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla.bench import results
from mla.bench.results.cases import KINDS
from mla.bench.results.rows import COLUMNS, as_csv, timing_rows
from mla.bench.results.schema import Case, Run, Timing

Bench = Callable[..., Any]
MakeRun = Callable[..., Run]
DOCS = Path(__file__).parents[3] / "docs" / "results.md"

# What a reader could take for a measurement of the case.
MEASURED = [
    *("latency_ms", "latency_ci95_low_ms", "latency_ci95_high_ms", "latency_p10_ms", "latency_p90_ms"),
    *("tokens_per_s", "tokens_per_s_ci95_low", "tokens_per_s_ci95_high", "samples", "passes"),
    *("needed_tflop_per_s", "needed_gb_per_s", "limit_percent", "planning_ms", "transient_bytes"),
    *(f"{kind}_ms" for kind in KINDS),
]


def timing(case: Case, status: Any = "ok", **changes: Any) -> Timing:
    """Return a further timing of a case, with the case's own samples."""
    fields = {"mode": "eager", "cache": "cold", "clock": "host", "passes": case.passes} | changes
    reason = "" if status == "ok" else f"it is {status}"
    withheld = status in ("wrong", "doubtful")
    return Timing(
        check=results.Check(status=status, reason=reason),
        latency_ms=None if withheld else case.latency_ms,
        **fields,
    )


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def table(*runs: Run) -> list[dict[str, str]]:
    return read(as_csv(timing_rows([(Path(f"{number}.json"), run) for number, run in enumerate(runs)])))


def test_every_way_of_timing_and_every_file_has_its_row(make_run: MakeRun) -> None:
    first, second = make_run(), make_run(scenario="other")
    case = first.cases[0]
    case.timings = [timing(case), timing(case, mode="graph", cache="warm")]
    rows = table(first, second)
    assert [(row["file"], row["scenario"], row["launch"], row["cache"]) for row in rows] == [
        ("0.json", "prefill", "eager", "warm"),
        ("0.json", "prefill", "eager", "cold"),
        ("0.json", "prefill", "graph", "warm"),
        ("1.json", "other", "eager", "warm"),
    ]
    assert float(rows[0]["latency_ms"]) == case.latency_ms.median  # type: ignore[union-attr]
    further = [(row["cold_ms"], row["graph_ms"], row["device_ms"]) for row in rows]
    assert further == [("2.0", "2.0", ""), *[("", "", "")] * 3]
    assert rows[0]["needed_tflop_per_s"] == "0.5"  # 1e9 FLOP in 2 ms
    assert rows[0]["tokens_per_s"]
    assert not rows[1]["tokens_per_s"], "throughput is the headline's"


@pytest.mark.parametrize("status", ["wrong", "doubtful"])
def test_a_case_without_a_number_has_none_in_any_row(make_run: MakeRun, status: str) -> None:
    check = results.Check(status=status, reason="because", relative_error=0.3)  # type: ignore[arg-type]
    run = make_run(
        check=check, memory=results.Memory(weight_bytes=1, cache_bytes=2, peak_bytes=None, transient_bytes=3)
    )
    case = run.cases[0]
    case.timings = [timing(case)]  # it was right itself
    for row in table(run):
        assert (row["status"], row["reason"]) == (status, "because")
        assert [name for name in MEASURED if row[name]] == []


def test_what_computes_nothing_has_no_speedup(make_run: MakeRun) -> None:
    run = make_run([4.0] * 6)
    run.cases += make_run([2.0] * 6, implementation="mine", ops={}).cases
    run.cases += make_run([1.0] * 6, implementation="read", ops={}, cost=results.Cost(flops=0, bytes=1)).cases
    assert [(row["baseline"], row["speedup"]) for row in table(run)] == [("", ""), ("mla", "2.0"), ("", "")]


def test_one_wrong_timing_keeps_its_reason_and_loses_its_number(make_run: MakeRun) -> None:
    run = make_run()
    run.cases[0].timings = [timing(run.cases[0], "doubtful")]
    headline, other = table(run)
    assert headline["latency_ms"]
    assert (other["status"], other["reason"], other["latency_ms"]) == ("doubtful", "it is doubtful", "")


def test_a_share_of_a_limit_in_doubt_is_not_told(make_run: MakeRun) -> None:
    (row,) = table(
        make_run(
            roofline=results.Roofline(floor_ms=3.0, fraction=1.5, bound="memory", doubt="above the limit")
        )
    )
    assert (row["limit_percent"], row["limit_doubt"]) == ("", "above the limit")
    (row,) = table(make_run(roofline=results.Roofline(floor_ms=1.0, bound="memory", fraction=0.5)))
    assert (row["limit_percent"], row["limit"]) == ("50.0", "memory")


@given(
    text=st.text(
        st.characters(exclude_categories=("Cs", "Cc")) | st.sampled_from('",\r\n=+-@\t'), max_size=20
    )
)
def test_text_survives_and_is_never_a_formula(make_run: MakeRun, text: str) -> None:
    run = make_run(repro=text)
    written = as_csv(timing_rows([(Path("a.json"), run)]))
    assert written.endswith("\r\n")
    assert re.sub(r'"(?:[^"]|"")*"', "", written).count("\r\n") == 2, "RFC 4180: a line per row, CRLF"
    (row,) = read(written)
    assert row["repro"] == (f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") and text else text)
    assert row["repro"][:1] not in ("=", "+", "-", "@", "\t", "\r") or not row["repro"]


def test_columns_are_documented_in_their_order() -> None:
    """A column that is renamed or moved breaks sheets that others have made."""
    section = DOCS.read_text().partition("## Export")[2].partition("\n## ")[0]
    rows_of_table = re.findall(r"^\| (`.+?) \|", section, re.MULTILINE)
    documented = [name for cell in rows_of_table for name in re.findall(r"`(\w+)`", cell)]
    assert documented == list(COLUMNS)


def test_the_command_writes_what_it_says(bench: Bench, make_run: MakeRun) -> None:
    run = make_run()
    results.write(run, Path("a.json"))
    wrong = make_run(latency_ms=None, tokens_per_s=None, passes=0, check=results.Check(status="wrong"))
    results.write(wrong, Path("b.json"))
    shown = bench("export", "a.json", "b.json", "--format", "csv")
    assert shown.code == 0
    assert shown.err == "exported 2 rows of 2 cases in 2 files; without a number: 1 wrong\n"
    assert bench("export", "a.json", "b.json", "--format", "csv", "-o", "out.csv").out == ""
    assert Path("out.csv").read_bytes().decode() == shown.out
    assert [row["status"] for row in read(shown.out)] == ["ok", "wrong"]


def test_a_result_file_is_never_overwritten(bench: Bench, make_run: MakeRun) -> None:
    results.write(make_run(), Path("a.json"))
    before = Path("a.json").read_bytes()
    done = bench("export", "a.json", "--format", "csv", "-o", "./a.json")
    assert (done.code, done.out) == (2, "")
    assert done.err == "error: cannot write 'a.json': it is one of the result files; name another file.\n"
    assert Path("a.json").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["a.json", "--format", "xml"], 2, "Error: Invalid value for '--format': 'xml' is not one of"),
        (["--format", "csv"], 2, "Error: Missing argument 'RUNS...'"),
        (["none.json", "--format", "csv"], 2, "error: cannot read 'none.json': No such file or directory."),
        (["text.json", "--format", "csv"], 2, "error: 'text.json' is not a result file: "),
        (["a.json", "--format", "csv", "-o", "no/x.csv"], 2, "error: cannot write 'no/x.csv': there is no"),
        (["empty.json", "--format", "csv", "-o", "out"], 5, "nothing to export: no case in empty.json"),
        (
            ["empty.json", "--format", "infinimetrics", "-o", "out"],
            5,
            "nothing to export: no case in empty.json",
        ),
        (
            ["a.json", "--format", "infinimetrics", "-o", "no/x"],
            2,
            "error: cannot make the folder 'no/x': No such file or directory.",
        ),
        (["a.json", "./a.json"], 2, "error: 'a.json' is given twice: name every result file once."),
    ],
)
def test_a_mistake_gets_its_sentence(
    bench: Bench, make_run: MakeRun, words: list[str], code: int, message: str
) -> None:
    run = make_run()
    results.write(run, Path("a.json"))
    Path("text.json").write_text("hello")
    run.cases = []
    results.write(run, Path("empty.json"))
    done = bench("export", *words)
    assert done.code == code
    assert done.error.startswith(message)
    assert done.out == ""
    assert not Path("out").exists()


def test_what_looks_at_results_needs_no_torch(process: Bench, make_run: MakeRun) -> None:
    """Results are looked at where no device is."""
    for name in ("a.json", "b.json"):
        results.write(make_run(), Path(name))
    (folder := Path("no_torch")).mkdir()
    (folder / "torch.py").write_text("raise ImportError('no torch here')")
    for words in (
        ("compare", "a.json", "b.json"),
        ("show", "a.json"),
        ("export", "a.json"),
        ("export", "a.json", "--format", "infinimetrics"),
        ("report", "a.json", "--html", "a.html"),
        ("list", "--workloads"),
        ("list", "--configs"),  # also where the vendor's torch is not installed yet
    ):
        done = process(*words, path=[folder.absolute()])
        assert done.code == 0, done.err
        assert done.out or words[0] == "report"
