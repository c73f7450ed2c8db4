"""`--model-path` and the original's command line, on real safetensors files."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_maker as maker
import pytest
from transformers_peer import needs_transformers

from benchmarks.attention_test import attention_test as original
from mla.bench import results
from mla.command.exit_codes import guarded

Bench = Callable[..., Any]

ATTENTION_TEST = Path(__file__).parents[3] / "benchmarks" / "attention_test.py"
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-000002.safetensors", "model-00002-of-000002.safetensors")


@needs_transformers
@pytest.mark.parametrize("layout", ["fp8-sharded", "hub-cache", "own-names-fp8", "bare-names"])
def test_a_checkpoint_is_compared_with_transformers(
    bench: Bench, small: list[str], layout: str, tmp_path: Path
) -> None:
    made = maker.LAYOUTS[layout].make(tmp_path / "model")
    words = ("--backend", "cpu", *small[2:], "--model-path", str(made.folder), "--layer", "3")
    done = bench(*words, "-o", "run.json")
    assert done.code == 0, done.err
    run = results.decode(Path("run.json").read_bytes())
    assert [case.implementation for case in run.cases] == ["mla", "transformers"] * 2
    assert all(case.check.status == "ok" for case in run.cases)
    assert run.config["q_lora_rank"] == 32
    assert f"--model-path {made.folder} --layer 3" in run.cases[0].repro


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (SHARDS[0], f"error: file '{SHARDS[0]}' of checkpoint 'model' is missing."),
        ("config.json", "error: cannot read config"),
    ],
)
def test_a_broken_checkpoint_ends_in_one_sentence(
    bench: Bench, small: list[str], name: str, sentence: str, tmp_path: Path
) -> None:
    (maker.LAYOUTS["fp8-sharded"].make(tmp_path / "model").folder / name).unlink()
    done = bench("--backend", "cpu", *small[2:], "--model-path", "model", "-o", "run.json")
    assert (done.code, done.out) == (2, "")
    assert done.error.startswith(sentence)
    assert not Path("run.json").exists()


def attention_test(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ATTENTION_TEST), *words]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    return done


@needs_transformers
def test_the_original_command_line_prints_the_original_format(tmp_path: Path) -> None:
    made = maker.LAYOUTS["bare-names"].make(tmp_path / "model")
    done = attention_test("--cpu", "--model_path", str(made.folder), "--runs", "6", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["=" * 78, "Test DeepSeek-R1 MLA (Multi-Head Latent Attention)", "=" * 78]
    assert lines[5] == "Performance Benchmark - Custom Implementation"
    assert lines[7] == (
        "Test Case PREFILL_TESTCASES: {'seqlens': [64, 128, 256, 256], 'pastlens': [512, 0, 0, 256]}"
    )
    start = r"\t WARMUPS=\d\d+ RUNS=6, MLA Custom, average latency per batch: "
    assert re.match(start, lines[8]), "warm-ups end when latencies have settled"
    assert lines[8].endswith(" ms")
    assert lines[10] == "-" * 78
    assert lines[12].startswith("Test DECODE_TESTCASES: {'seqlens': [1, 1, 1, ")
    assert re.match(r"\t WARMUPS=\d\d+ RUNS=6, MLA Custom, average throughput: ", lines[13])
    assert "Performance Benchmark - Transformers Implementation" in lines
    summary = lines[lines.index("Test Summary") :]
    assert [line.partition(":")[0] for line in summary[2:-1]] == [
        "Custom Implementation - Prefill Latency",
        "Transformers Implementation - Prefill Latency",
        "Custom Implementation - Decode Throughput",
        "Transformers Implementation - Decode Throughput",
    ]
    assert summary[-1] == "=" * 78


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        ((), 2, "Error: choose a device: --cpu, --nvidia, --moore, --metax, --iluvatar, --cambricon, "),
        (("--cpu", "--hygon"), 2, "Error: --cpu and --hygon are several devices: run once for each of them."),
        (
            ("--hygon",),
            3,
            "error: backend 'hygon': there is no plugin for Hygon DCUs; with Hygon's torch for ",
        ),
        (
            ("--cpu", "--model_path", "nowhere"),
            2,
            "error: --model-path 'nowhere' does not exist: it takes a folder with config.json and "
            "safetensors.",
        ),
        (("--gpu",), 2, "Error: No such option"),
    ],
)
def test_the_original_command_line_refuses_in_one_sentence(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], code: int, sentence: str
) -> None:
    assert guarded(lambda: original.main(list(words), standalone_mode=False)) == code
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith(sentence)
    assert "Traceback" not in said


def test_a_checkpoint_s_layer_with_an_indexer_is_timed_alone_and_one_that_shares_is_refused(
    bench: Bench, small: list[str], tmp_path: Path
) -> None:
    """Layers 0 and 1 have an indexer here, and layer 1's selection is what layer 2 attends."""
    types = {"num_hidden_layers": 3, "indexer_types": ["full", "full", "shared"], "rope_scaling": None}
    values = maker.values_of("tiny", **{"model_type": "glm_moe_dsa", **types, **maker.INDEXER})
    shards = []
    for layer in range(3):
        state = maker.plain(values, seed=layer)
        if layer == 2:
            state = {name: weight for name, weight in state.items() if not name.startswith("indexer.")}
        shards.append(maker.named(state, f"model.layers.{layer}.self_attn."))
    folder = maker.write(tmp_path / "model", values, *shards, index=True)
    words = ("--backend", "cpu", *small[2:], "--model-path", str(folder), "--layer")
    done = bench(*words, "1", "-o", "run.json")
    assert done.code == 0, done.err
    assert "transformers is skipped: it does not report which tokens its indexer selects" in done.err
    run = results.decode(Path("run.json").read_bytes())
    assert {case.check.status for case in run.cases} == {"ok"}
    refused = bench(*words, "2")
    assert refused.code == 2
    assert "shares another's selection: choose one with an indexer, such as --layer 0." in refused.error
