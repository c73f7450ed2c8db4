"""The comparison with `transformers`: every side is measured, and documented tables are what was found."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.transformers import run, sides, summary, turns
from benchmarks.transformers.meters import Memory
from benchmarks.transformers.record import Row, read
from mla.config import MLAConfig

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--config", "deepseek-v2-lite", "--rounds", "2", "--seconds", "0.001", "--history", "70"]


def test_every_side_is_measured_in_every_phase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.main([*QUICK, "-o", str(tmp_path / "found.json")])
    rows = read(tmp_path / "found.json").rows
    assert {(row.phase, row.history, row.new_tokens) for row in rows} == {
        ("decode", 70, 1),
        ("append", 70, 64),
        ("prefill", 0, 70),
    }
    kinds = {(name, dtype) for name in ("sdpa", "eager") for dtype in ("bfloat16", "float16", "float32")}
    assert {(row.side, row.dtype) for row in rows} == kinds | {("mla", "bfloat16"), ("mla-paged", "bfloat16")}
    for row in rows:
        if not row.left_out:
            assert [len(one) for one in row.model_ms] == [1, 1]
            assert all(0 < some < whole for some, whole in _both(row)), row
        width = 576 * (4 if row.dtype == "float32" else 2)
        unit = 64 if row.side == "mla-paged" else 1
        assert row.left_out or row.cache_bytes == -(-row.tokens // unit) * unit * width
        assert row.left_out or row.transient_bytes > 0
    assert any(row.model_ms for row in rows if row.side in ("sdpa", "eager"))
    summary.main([str(tmp_path / "found.json"), "--pictures", str(tmp_path / "pictures")])
    assert len(list((tmp_path / "pictures").iterdir())) == 6
    assert "### deepseek-v2-lite: memory" in capsys.readouterr().out


def _both(row: Row) -> list[tuple[float, float]]:
    """Return pairs of times: of attention, and of the model around it."""
    pairs = zip(row.attention_ms, row.model_ms, strict=True)
    return [pair for some, whole in pairs for pair in zip(some, whole, strict=True)]


def test_sides_that_attend_differently_have_no_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*arguments: Any) -> dict[str, Any]:
        cache = right(*arguments)
        if arguments[0].name == "mla":
            next(iter(cache.values())).layers[0].values.zero_()  # rotary keys
        return cache

    right = sides.Side.cache
    monkeypatch.setattr(sides.Side, "cache", other)
    with pytest.raises(turns.Disagreement, match=r"^mla in bfloat16: attention differs by "):
        run.main([*QUICK, "--phase", "decode", "-o", str(tmp_path / "found.json")])


def test_the_weights_of_a_side_are_those_of_its_model() -> None:
    config = MLAConfig.named("deepseek-v2-lite")
    for side in sides.make_sides(config, "cpu", torch.device("cpu"), 64):
        parameters = sum(one.nbytes for one in side.model.parameters())
        if side.backend:  # packed: no parameters
            parameters = sum(one.nbytes for one in side.model.state_dict().values())
            twice = 2 * config.kv_lora_rank * config.num_attention_heads * 256
            assert parameters < side.weight_bytes < 1.2 * (parameters + twice)
        else:
            assert 0.95 * parameters < side.weight_bytes < 1.1 * parameters


def test_memory_is_what_a_block_takes_at_most() -> None:
    size = 64 << 20
    memory = Memory(torch.device("cpu"))
    with memory.peak() as taken:
        torch.ones(size, dtype=torch.uint8)  # and given back
    assert 0.98 * size < taken[0] < 1.1 * size


def test_the_documented_tables_are_those_of_the_committed_runs(capsys: pytest.CaptureFixture[str]) -> None:
    folder = ROOT / "benchmarks" / "transformers"
    for path in sorted((folder / "results").glob("*.json")):
        summary.main([str(path)])
    found = _rows(capsys.readouterr().out)
    assert found
    assert _rows((folder / "README.md").read_text()) == found
    section = (ROOT / "docs" / "transformers.md").read_text().split("## How fast it is")[1].split("\n## ")[0]
    assert set() < _rows(section) <= found


def _rows(text: str) -> set[str]:
    """Return the rows of tables whose first cell is a number."""
    return set(re.findall(r"^\| \d+ \|.*$", text, re.MULTILINE))
