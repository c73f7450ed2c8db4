"""`--model-path` and the original's command line, on real safetensors files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import mla
from mla.bench import results
from mla.checkpoint import CheckpointError, read_layer
from mla.weights import random_state_dict

Bench = Callable[..., Any]

ATTENTION_TEST = Path(__file__).parents[2] / "benchmarks" / "attention_test.py"
CONFIG = {
    "model_type": "deepseek_v3",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return random_state_dict(mla.MLAConfig.from_pretrained(CONFIG), seed=5)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes files of tensors and a config.json, and returns the folder."""

    def checkpoint(*files: dict[str, torch.Tensor]) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG))
        for number, tensors in enumerate(files, 1):
            save_file(tensors, folder / f"model-{number:05d}-of-{len(files):05d}.safetensors")
        return folder

    return checkpoint


def named(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize("prefix", ["", "self_attn.", "model.layers.3.self_attn."])
def test_the_only_layer_is_found_under_any_of_its_names(
    checkpoint: Callable[..., Path], state: dict[str, torch.Tensor], prefix: str
) -> None:
    tensors = named(state, prefix) | {"model.layers.3.mlp.gate.weight": torch.ones(2)}
    layer = mla.MLA.from_pretrained(checkpoint(tensors), dtype=torch.bfloat16)
    assert layer.config.rope_scaling is not None
    assert all(torch.equal(weight, state[name]) for name, weight in layer.state_dict().items())


def test_a_layer_is_chosen_among_shards(
    checkpoint: Callable[..., Path], state: dict[str, torch.Tensor]
) -> None:
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    wanted = named(state, "model.layers.1.self_attn.")
    half = dict(list(wanted.items())[:3])
    rest = {name: tensor for name, tensor in wanted.items() if name not in half}
    folder = checkpoint(half | named(other, "model.layers.0.self_attn."), rest)
    config = mla.MLAConfig.from_pretrained(folder)
    found = read_layer(folder, config, layer=1)
    assert all(torch.equal(found[name], state[name]) for name in state)
    with pytest.raises(CheckpointError, match="holds layers 0, 1: choose one with layer=N"):
        read_layer(folder, config)
    with pytest.raises(CheckpointError, match="no attention weights of layer 7"):
        read_layer(folder, config, layer=7)


def test_what_cannot_be_read_is_refused_by_name(
    checkpoint: Callable[..., Path], state: dict[str, torch.Tensor]
) -> None:
    folder = checkpoint(named(state, ""))
    config = mla.MLAConfig.from_pretrained(folder)
    file = folder / "model-00001-of-00001.safetensors"
    eight = {**state, "o_proj.weight": state["o_proj.weight"].to(torch.float8_e4m3fn)}
    for tensors, reason in (
        (
            {name: tensor for name, tensor in state.items() if name != "o_proj.weight"},
            "no tensor 'o_proj.weight'",
        ),
        (eight, r"'o_proj.weight' in .* is torch.float8_e4m3fn: only BF16, FP16 and FP32 are read"),
        ({"unrelated": torch.ones(1)}, "holds no MLA attention weights"),
    ):
        save_file(tensors, file)
        with pytest.raises(CheckpointError, match=reason):
            read_layer(folder, config)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=r"model-00001-of-00001.safetensors' cannot be read"):
        read_layer(folder, config)


def test_a_checkpoint_is_compared_with_transformers(
    bench: Bench, small: list[str], checkpoint: Callable[..., Path], state: dict[str, torch.Tensor]
) -> None:
    folder = checkpoint(named(state, "model.layers.0.self_attn."))
    done = bench("--backend", "cpu", *small[2:], "--model-path", str(folder), "-o", "run.json")
    assert done.code == 0, done.err
    run = results.decode(Path("run.json").read_bytes())
    assert [case.implementation for case in run.cases] == ["mla", "transformers"] * 2
    assert all(case.check.status == "ok" for case in run.cases)
    assert run.config["q_lora_rank"] == 24
    assert f"--model-path {folder}" in run.cases[0].repro


def attention_test(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ATTENTION_TEST), *words]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    return done


def test_the_original_command_line_prints_the_original_format(
    tmp_path: Path, checkpoint: Callable[..., Path], state: dict[str, torch.Tensor]
) -> None:
    folder = checkpoint(named(state, ""))
    done = attention_test("--cpu", "--model_path", str(folder), "--runs", "6", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["=" * 78, "Test DeepSeek-R1 MLA (Multi-Head Latent Attention)", "=" * 78]
    assert lines[5] == "Performance Benchmark - Custom Implementation"
    assert lines[7] == (
        "Test Case PREFILL_TESTCASES: {'seqlens': [64, 128, 256, 256], 'pastlens': [512, 0, 0, 256]}"
    )
    assert lines[8].startswith("\t WARMUPS=10 RUNS=6, MLA Custom, average latency per batch: ")
    assert lines[8].endswith(" ms")
    assert lines[10] == "-" * 78
    assert lines[12].startswith("Test DECODE_TESTCASES: {'seqlens': [1, 1, 1, ")
    assert lines[13].startswith("\t WARMUPS=6 RUNS=6, MLA Custom, average throughput: ")
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
        ((), 2, "Error: choose a device: --cpu, --nvidia, --moore, --metax, --iluvatar."),
        (
            ("--cpu", "--model_path", "nowhere"),
            2,
            "error: cannot read config 'nowhere': No such file or directory.",
        ),
        (("--gpu",), 2, "Error: No such option"),
    ],
)
def test_the_original_command_line_refuses_in_one_sentence(
    tmp_path: Path, words: tuple[str, ...], code: int, sentence: str
) -> None:
    done = attention_test(*words, cwd=tmp_path)
    assert done.returncode == code
    assert done.stderr.splitlines()[-1].startswith(sentence)
