"""The tables: figures against the original's and against ceilings, recomputed from the files."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

import pytest

from benchmarks.gpu.record import Ledger, Record
from benchmarks.gpu.report import figures, in_turns, tables
from benchmarks.gpu.steps import Section, Step
from mla.bench import results

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
STORED = RESULTS / "cpu-epyc-zen4-avx512-bf16-2vcpu-deepseek-v2-lite.json"
R1 = RESULTS / "cpu-epyc-zen5-avx512-bf16-2vcpu-deepseek-r1.json"


def samples(run: results.Run, scenario: str) -> list[float]:
    case = next(one for one in run.cases if (one.scenario, one.implementation) == (scenario, "mla"))
    assert case.latency_ms is not None
    return case.latency_ms.samples


def test_standard_figures_are_means_over_the_originals() -> None:
    run = results.read(STORED)
    rows = {row[1]: row for row in figures.standard_rows({"step": run})}
    prefill, decode = (statistics.fmean(samples(run, name)) for name in ("prefill", "decode"))
    assert rows["prefill, mla"][4:7] == [f"{prefill:.4g} ms", "2.22 ms", f"{2.22 / prefill:.3g}x"]
    rate = 16 / decode * 1000
    assert rows["decode, mla"][4:7] == [f"{rate:.4g} tok/s", "2224.27 tok/s", f"{rate / 2224.27:.3g}x"]


def test_other_sizes_are_not_compared_with_the_original() -> None:
    rows = figures.standard_rows({"step": results.read(R1)})
    assert rows
    assert {tuple(row[5:7]) for row in rows} == {("-", "-")}


def test_a_wrong_case_has_no_figure_but_its_verdict() -> None:
    run = results.read(STORED)
    case = run.cases[0]
    case.latency_ms, case.check = None, results.Check(status="wrong", reason="row 3 is off")
    assert figures.standard_rows({"step": run})[0][4:] == ["-", "-", "-", "wrong row 3 is off"]


def test_shares_are_of_the_measured_ceilings() -> None:
    run = results.read(STORED)
    (case,) = (one for one in run.cases if (one.scenario, one.implementation) == ("decode", "mla"))
    assert case.latency_ms is not None
    rates = [work / (case.latency_ms.median / 1000) for work in (case.cost.bytes, case.cost.flops)]
    ceilings = {"copy": rates[0] / 0.25, "matmul": rates[1] / 0.5}
    rows = {row[1]: row for row in figures.attention_rows({"step": run}, ceilings)}
    assert rows["decode, mla"][4:6] == ["25 %", "50 %"]
    assert figures.attention_rows({"step": run}, {})[0][4:6] == ["-", "-"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a campaign that ran a step of each kind."""
    for name in ("standard", "grid", "rivals-16", "facts", "questions"):
        (tmp_path / name).mkdir()
    shutil.copyfile(STORED, tmp_path / "standard" / "x-v2.json")
    shutil.copyfile(STORED, tmp_path / "grid" / "x-heads.json")
    shutil.copyfile(STORED, tmp_path / "rivals-16" / "x-latent.json")
    answer = {"question": "Why?", "answer": "Because | of it", "evidence": {"us": 3}}
    (tmp_path / "questions" / "x-why.json").write_text(json.dumps(answer))
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
    (tmp_path / "facts" / "x-ceilings.json").write_text(json.dumps(ceilings))
    return tmp_path


def test_the_report_holds_steps_figures_answers_and_machine(folder: Path) -> None:
    names = {
        "facts": "ceilings", "standard": "v2", "grid": "heads", "rivals-16": "latent", "questions": "why",
    }  # fmt: skip
    sections = [Section(name, name, (Step(step, (), 1),)) for name, step in names.items()]
    ledger = Ledger(backend="x", card="Card", smoke=True, facts={"driver": "1.2"}, ops={})
    for name, step in reversed(names.items()):
        ledger.put(Record(section=name, step=step, verdict="ok", reason=f"{step} is fine"))
    report = tables.Report(ledger, folder, sections)
    plain, text = report.plain(), report.markdown()
    assert [line.split()[0] for line in plain.splitlines()[1:6]] == list(names)
    assert "2224.27 tok/s" in plain
    assert "decode of deepseek-v2-lite: attention was native_latent_attention" in plain
    titles = [line for line in text.splitlines() if line.startswith("#")]
    assert titles == [
        "# Card, backend x (--smoke: tiny sizes, which say nothing about the card)",
        "## Steps", "## Targets", "## Standard scenarios", "## Kernels in turns", "## Decode attention",
        "## Answers", "## Machine",
    ]  # fmt: skip
    assert "| Why? | Because \\| of it | us 3 |" in text
    assert "| driver | 1.2 |" in text
    grid = figures.attention_rows({"heads": results.read(STORED)}, {"copy": 1e11, "matmul": 1e12})
    assert all(" | ".join(row[:6]) in text for row in grid)
    limits = {in_turns.COPY: 1e11, in_turns.PRODUCT: 5e11}
    assert all(" | ".join(row) in text for row in in_turns.rows({"latent": results.read(STORED)}, limits))
