"""The page of sparse attention is made of the files beside it."""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest.mock import ANY

import pytest

from benchmarks.peers.sparse_table import DENSE, STAGE, by_shape, render, row, total
from mla.bench import results

FOLDER = Path(__file__).parents[2] / "benchmarks" / "results" / "sparse"


def test_the_committed_page_is_made_of_the_files_beside_it() -> None:
    page, drawn = render(FOLDER)
    assert (FOLDER / "table.md").read_text() == page, "run `python benchmarks/peers/sparse_table.py`"
    assert all((FOLDER / name).is_file() for name in drawn)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the file of all ops."""
    shutil.copy(next(FOLDER.glob("ops-*cpu.json")), tmp_path)
    return tmp_path


def test_a_gain_is_of_both_ops_together_and_only_of_right_ones(folder: Path) -> None:
    (path,) = folder.iterdir()
    run = results.read(path)
    shape, cases = next((at, ops) for at, ops in by_shape([run]).items() if {DENSE, *STAGE} <= ops.keys())
    dense, sparse = total(cases, DENSE), total(cases, *STAGE)
    assert dense
    assert sparse == sum(total(cases, op) or 0 for op in STAGE)
    line = next(
        x for x in render(folder)[0].splitlines() if x.startswith(f"| {shape[0]} | {shape[1] >> 10}k")
    )
    assert line.split("|")[-2].strip() == f"{dense / sparse:.1f}x"
    checks = {case.op or "": "wrong" if case.op == STAGE[0] else "ok" for case in run.cases}
    for case in run.cases:
        case.check.status = checks[case.op or ""]  # type: ignore[assignment]
    assert row(shape, by_shape([run])[shape])[-3:] == ["-", ANY, "-"]
