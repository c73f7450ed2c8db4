"""The comparison with `transformers`: it measures every side, and says in a sentence why it cannot."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import allocator
from benchmarks.transformers import meters, run, sides, summary, turns, worker
from benchmarks.transformers.meters import Memory
from benchmarks.transformers.record import Row, read
from mla.errors import MLAError

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--config", "deepseek-v2-lite", "--rounds", "2", "--seconds", "0.001", "--history", "70"]
TASK = worker.Task("deepseek-v2-lite", "cpu", "decode", "default", 1, 1100, 1, 0.001)


def test_every_side_is_measured_with_each_allocator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, program = tmp_path / "found.json", "import sys; sys.path.append(sys.argv.pop(1)); from "
    program += "benchmarks.transformers.run import main; sys.exit(main())"
    words = ["--batch", "2", "--phase", "decode", "-o", str(path)]
    command = [sys.executable, "-c", program, str(ROOT), *QUICK, *words]
    subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    record = read(path)
    assert {"cpu_capability", "backend.kernels", "libc"} <= record.environment.keys()
    assert record.allocators == {"default": "", "kept": allocator.TUNABLES}
    phases = {(row.phase, row.history, row.new_tokens) for row in record.rows}
    assert phases == {("decode", 70, 1)}
    kinds = {(name, dtype) for name in ("sdpa", "eager") for dtype in ("bfloat16", "float16", "float32")}
    kinds |= {("mla", "bfloat16"), ("mla-paged", "bfloat16")}
    for setting in record.allocators:
        assert {(row.side, row.dtype) for row in record.rows if row.allocator == setting} == kinds
    for row in record.rows:
        _check_memory(row)
        if not row.left_out:
            assert [len(one) for one in row.model_ms] == [1, 1]
            assert all(0 < some < whole for some, whole in _both(row)), row
            assert row.side == "sdpa" or row.deviation is not None
    assert any(row.model_ms for row in record.rows if row.side in ("sdpa", "eager"))
    summary.main([str(path)])
    assert "### deepseek-v2-lite, 2 requests: memory of a forward" in capsys.readouterr().out


@pytest.mark.parametrize(("phase", "history", "new"), [("append", 70, 64), ("prefill", 0, 70)])
def test_every_side_is_measured_in_other_phases(phase: str, history: int, new: int) -> None:
    rows = worker.run(replace(TASK, phase=phase), 70)
    assert {(row.history, row.new_tokens, row.requests) for row in rows} == {(history, new, 1)}
    assert len(rows) == 8
    assert all(row.model_ms for row in rows if not row.left_out)
    assert all(row.deviation is not None for row in rows[1:])


def _check_memory(row: Row) -> None:
    """Weights are there once, but for kv_b_proj with our ops; latents are those of all tokens."""
    size = 4 if row.dtype == "float32" else 2
    weights, kv_b_proj = 13_763_072 * size, 512 * 16 * 256 * size
    more = kv_b_proj if row.side.startswith("mla") else 0
    assert 0.93 * (weights + more) < row.weight_bytes < 1.15 * (weights + more), row
    unit = 64 if row.side == "mla-paged" else 1
    assert row.requests == 2
    assert row.left_out or row.cache_bytes == 2 * -(-row.tokens // unit) * unit * 576 * size
    assert row.left_out or row.transient_bytes > 0


def _both(row: Row) -> list[tuple[float, float]]:
    """Return pairs of times: of attention, and of the model around it."""
    pairs = zip(row.attention_ms, row.model_ms, strict=True)
    return [pair for some, whole in pairs for pair in zip(some, whole, strict=True)]


def test_sides_that_attend_differently_have_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*arguments: Any) -> dict[str, Any]:
        cache = right(*arguments)
        if arguments[0].name == "mla":
            next(iter(cache.values())).layers[0].values.zero_()  # rotary keys
        return cache

    right = sides.Side.cache
    monkeypatch.setattr(sides.Side, "cache", other)
    with pytest.raises(turns.Disagreement, match="mla in bfloat16: attention differs by "):
        worker.run(TASK, 70)


def test_what_cannot_be_run_or_read_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.json"
    other.write_text("{}")
    for main, arguments in (
        (run.main, ["-o", str(tmp_path)]),
        (run.main, ["-o", str(tmp_path / "new" / "found.json"), "--backend", "nobody"]),
        (summary.main, [str(tmp_path / "missing.json")]),
        (summary.main, [str(other)]),
    ):
        assert main(arguments) == 1
        assert re.fullmatch(r"error: .*\n", capsys.readouterr().err), arguments


@pytest.mark.parametrize("missing", ["reset of the peak", "malloc_trim"])
def test_a_host_without_a_meter_is_refused_before_anything_runs(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if missing == "malloc_trim":
        monkeypatch.setattr(meters.ctypes, "CDLL", lambda _: object())
    else:
        monkeypatch.setattr(meters, "_PROC", tmp_path)
    monkeypatch.delattr(worker, "process")
    assert run.main([*QUICK, "-o", str(tmp_path / "new" / "found.json")]) == 1
    assert re.fullmatch(r"error: on the host, this needs Linux with glibc, .*\n", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_without_transformers_the_tool_says_so() -> None:
    program = "import runpy, sys; sys.modules['transformers'] = None; "
    program += "runpy.run_module('benchmarks.transformers.run', None, '__main__')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert re.fullmatch(r"error: this needs transformers [\d.]+ or later: .+\n", done.stderr)


def die(*_: Any) -> None:
    """End a process as one without memory is ended."""
    os._exit(9)


def test_errors_and_the_end_of_a_process_are_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    with worker.process(replace(TASK, config="nobody")) as rows:
        with pytest.raises(MLAError, match="unknown config 'nobody'"):
            rows(70)
        monkeypatch.setattr(worker, "run", die)
        with pytest.raises(worker.Ended, match="died in decode with 70 tokens, default allocator"):
            rows(70)


def test_freed_memory_stays_in_a_process_whose_allocator_keeps_it() -> None:
    def faults(tunables: str) -> int:
        program = (
            "import resource, torch\nuse = lambda: torch.ones(64 << 20, dtype=torch.int8)\nuse(), use()\n"
        )
        program += "now = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\nbefore = now(); use()\n"
        with allocator.setting(tunables):
            command = [sys.executable, "-c", f"{program}print(now() - before)"]
            return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    before = os.environ.get(allocator.VARIABLE)
    assert faults(allocator.TUNABLES) < 16 < faults("")
    assert os.environ.get(allocator.VARIABLE) == before


def test_settings_of_the_allocator_take_turns() -> None:
    asked = run._parse(["-o", "found.json", "--config", "deepseek-r1", "--batch", "3", "--history", "100"])
    tasks = list(run._tasks(asked, ["default", "kept"]))
    assert [(task.phase, task.allocator) for task in tasks] == [
        *(("decode", "default"), ("decode", "kept")),
        *(("append", "kept"), ("append", "default")),
        *(("prefill", "default"), ("prefill", "kept")),
    ]
    assert {(task.requests, task.tokens) for task in tasks} == {(3, 3 * 1124)}


def test_memory_is_what_a_block_takes_at_most() -> None:
    size = 64 << 20
    memory = Memory(torch.device("cpu"))
    with memory.peak() as taken:
        torch.ones(size, dtype=torch.uint8)  # and given back
    assert 0.98 * size < taken[0] < 1.1 * size
