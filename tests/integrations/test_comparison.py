"""The comparison with `transformers`: every side is measured, and documented tables are what was found."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.transformers import run, sides, summary
from benchmarks.transformers.meters import Memory
from benchmarks.transformers.record import Row, read

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--config", "deepseek-v2-lite", "--rounds", "2", "--seconds", "0.001", "--history", "70"]


def test_every_side_is_measured_in_every_phase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # In a process of its own: memory that another test has left free would be taken again, and not be seen.
    path, program = tmp_path / "found.json", "import sys; sys.path.append(sys.argv.pop(1)); from "
    program += "benchmarks.transformers.run import main; sys.exit(main())"
    command = [sys.executable, "-c", program, str(ROOT), *QUICK, "-o", str(path)]
    subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    rows = read(path).rows
    assert {(row.phase, row.history, row.new_tokens) for row in rows} == {
        ("decode", 70, 1),
        ("append", 70, 64),
        ("prefill", 0, 70),
    }
    kinds = {(name, dtype) for name in ("sdpa", "eager") for dtype in ("bfloat16", "float16", "float32")}
    assert {(row.side, row.dtype) for row in rows} == kinds | {("mla", "bfloat16"), ("mla-paged", "bfloat16")}
    for row in rows:
        _check_memory(row)
        if not row.left_out:
            assert [len(one) for one in row.model_ms] == [1, 1]
            assert all(0 < some < whole for some, whole in _both(row)), row
    assert any(row.model_ms for row in rows if row.side in ("sdpa", "eager"))
    summary.main([str(path), "--pictures", str(tmp_path / "pictures")])
    assert len(list((tmp_path / "pictures").iterdir())) == 6
    assert "### deepseek-v2-lite: memory" in capsys.readouterr().out


def _check_memory(row: Row) -> None:
    """Weights are there once, but for kv_b_proj with our ops; latents are those of all tokens."""
    size = 4 if row.dtype == "float32" else 2
    weights, kv_b_proj = 19_536_384 * size, 512 * 16 * 256 * size
    more = kv_b_proj if row.side.startswith("mla") else 0
    assert 0.95 * weights < row.weight_bytes < 1.2 * (weights + more), row
    unit = 64 if row.side == "mla-paged" else 1
    assert row.left_out or row.cache_bytes == -(-row.tokens // unit) * unit * 576 * size
    assert row.left_out or row.transient_bytes > 0


def _both(row: Row) -> list[tuple[float, float]]:
    """Return pairs of times: of attention, and of the model around it."""
    pairs = zip(row.attention_ms, row.model_ms, strict=True)
    return [pair for some, whole in pairs for pair in zip(some, whole, strict=True)]


def test_sides_that_attend_differently_have_no_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def other(*arguments: Any) -> dict[str, Any]:
        cache = right(*arguments)
        if arguments[0].name == "mla":
            next(iter(cache.values())).layers[0].values.zero_()  # rotary keys
        return cache

    right = sides.Side.cache
    monkeypatch.setattr(sides.Side, "cache", other)
    assert run.main([*QUICK, "--phase", "decode", "-o", str(tmp_path / "found.json")]) == 1
    assert re.fullmatch(r"error: mla in bfloat16: attention differs by .*\n", capsys.readouterr().err)


def test_what_cannot_be_run_or_read_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.json"
    other.write_text("{}")
    for main, words in (
        (run.main, ["-o", str(tmp_path)]),
        (run.main, ["-o", str(tmp_path / "new" / "found.json"), "--backend", "nobody"]),
        (summary.main, [str(tmp_path / "missing.json")]),
        (summary.main, [str(other)]),
    ):
        assert main(words) == 1
        assert re.fullmatch(r"error: .*\n", capsys.readouterr().err), words


def test_memory_is_what_a_block_takes_at_most() -> None:
    size = 64 << 20
    memory = Memory(torch.device("cpu"))
    with memory.peak() as taken:
        torch.ones(size, dtype=torch.uint8)  # and given back
    assert 0.98 * size < taken[0] < 1.1 * size


def test_documented_tables_and_pictures_are_those_of_the_committed_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ROOT / "benchmarks" / "transformers"
    for path in sorted((folder / "results").glob("*.json")):
        summary.main([str(path), "--pictures", str(tmp_path / "drawn")])
    found = _rows(capsys.readouterr().out)
    assert found
    assert _rows((folder / "README.md").read_text()) == found
    section = (ROOT / "docs" / "transformers.md").read_text().split("## How fast it is")[1].split("\n## ")[0]
    assert set() < _rows(section) <= found
    drawn, committed = (_words(path) for path in (tmp_path / "drawn", ROOT / "docs/pictures/transformers"))
    assert drawn == committed


def _words(folder: Path) -> dict[str, list[str]]:
    """Return what is written in each picture, which other releases of the drawing library place otherwise."""
    return {path.name: re.findall(r">([^<>\s][^<>]*)<", path.read_text()) for path in folder.iterdir()}


def _rows(text: str) -> set[str]:
    """Return the rows of tables whose first cell is a number."""
    return set(re.findall(r"^\| \d+ \|.*$", text, re.MULTILINE))
