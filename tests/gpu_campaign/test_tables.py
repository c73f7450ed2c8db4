"""The table: figures against the original's and against ceilings, recomputed from the files."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

import pytest

from benchmarks.gpu import table
from benchmarks.gpu.report import in_turns
from mla.bench import results

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
STORED = RESULTS / "cpu-epyc-zen4-avx512-bf16-2vcpu-deepseek-v2-lite.json"
R1 = RESULTS / "cpu-epyc-zen5-avx512-bf16-2vcpu-deepseek-r1.json"


def samples(run: results.Run, scenario: str) -> list[float]:
    case = next(each for each in run.cases if (each.scenario, each.implementation) == (scenario, "mla"))
    assert case.latency_ms is not None
    return case.latency_ms.samples


def test_standard_figures_are_means_over_the_originals() -> None:
    run = results.read(STORED)
    rows = {row[1]: row for row in table.standard_rows({"step": run})}
    prefill, decode = (statistics.fmean(samples(run, name)) for name in ("prefill", "decode"))
    assert rows["prefill, mla"][4:7] == [f"{prefill:.4g} ms", "2.22 ms", f"{2.22 / prefill:.3g}x"]
    rate = 16 / decode * 1000
    assert rows["decode, mla"][4:7] == [f"{rate:.4g} tok/s", "2224.27 tok/s", f"{rate / 2224.27:.3g}x"]


def test_other_sizes_are_not_compared_with_the_original() -> None:
    rows = table.standard_rows({"step": results.read(R1)})
    assert rows
    assert {tuple(row[5:7]) for row in rows} == {("-", "-")}


def test_a_wrong_case_has_no_figure_but_its_verdict() -> None:
    run = results.read(STORED)
    case = run.cases[0]
    case.latency_ms, case.check = None, results.Check(status="wrong", reason="row 3 is off")
    assert table.standard_rows({"step": run})[0][4:] == ["-", "-", "-", "wrong row 3 is off"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of results with a step of each kind."""
    for name in ("standard-v2", "grid-16", "rivals-16"):
        shutil.copyfile(STORED, tmp_path / f"{name}.json")
    shutil.copyfile(R1, tmp_path / "rivals-16-tuned.json")
    answer = {"question": "Why?", "answer": "Because | of it", "evidence": {"us": 3}}
    (tmp_path / "ask-why.out").write_text(f"a library says something\n{json.dumps(answer)}\n")
    (tmp_path / "ask-broken.out").write_text("")
    (tmp_path / "card").write_text("x, Card (tiny sizes, which say nothing about the card)\n")
    (tmp_path / "left").write_text("1 step is left: facts\n")
    (tmp_path / "steps.tsv").write_text(
        'grid-16\tcrashed\tfailed\t1\t3\t200\tit said "so\n'
        "ask-why\tok\tdone\t0\t2\t60\tasked\n"
        "grid-16\tok\tcut\t0\t9\t200\tgrid is fine\n"
    )
    made = results.read(STORED)
    ceilings = {
        "report": "ceilings", "schema_version": 1, "argv": [], "created": made.created, "git_commit": None,
        "backend": {**json.loads(STORED.read_bytes())["backend"], "cache_bytes": 1000},
        "environment": {}, "declared": [],
        "measured": [
            {"work": "copy", "value": 9e15, "source": "in the cache", "footprint_bytes": 1000},
            {"work": "copy", "value": 1e11, "source": "beyond it", "footprint_bytes": 4000},
            {"work": "matmul", "value": 9e15, "source": "other", "dtype": "float32"},
            {"work": "matmul", "value": 1e12, "source": "ours", "dtype": "bfloat16", "footprint_bytes": 10},
            {"work": "matmul", "value": 5e11, "source": "measured: torch.mm, 8192 x 8192 x 8192 bfloat16",
             "dtype": "bfloat16", "footprint_bytes": 9},
        ],
    }  # fmt: skip
    (tmp_path / "facts.json").write_text(json.dumps(ceilings))
    return tmp_path


def test_a_message_that_was_cut_inside_a_character_is_shown(folder: Path) -> None:
    with (folder / "steps.tsv").open("ab") as file:
        file.write("facts\tcrashed\tfailed\t1\t2\t120\tno dev\u00edce".encode()[:-4] + b"\xc3\n")
    assert "| facts | crashed | 1 | 2 | no dev\ufffd |" in table.report(folder)


def test_the_report_holds_steps_figures_answers_and_machine(folder: Path) -> None:
    text = table.report(folder)
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# x, Card (tiny sizes, which say nothing about the card)",
        "## Steps", "## Targets", "## Standard scenarios", "## Kernels in turns", "## Other runs",
        "## Answers", "## Machine",
    ]  # fmt: skip
    assert "\n1 step is left: facts\n" in text
    assert "| grid-16 | ok (cut short) | 0 | 9 | grid is fine |" in text
    assert "crashed" not in text, "the last attempt counts"
    assert "2224.27 tok/s" in text
    assert "| Why? | Because \\| of it | us 3 |" in text
    ceilings = {"copy": 1e11, "matmul": 1e12, in_turns.COPY: 1e11, in_turns.PRODUCT: 5e11}
    assert table.ceilings_in(folder) == ceilings
    grid = table.case_rows({"grid-16": results.read(STORED)})
    assert len(grid) > 1
    assert all(" | ".join(row) in text for row in grid)
    tuned = in_turns.rows({"x": results.read(R1)}, ceilings)
    assert all(" | ".join(row) in text for row in tuned), "with the tuning that was found"
