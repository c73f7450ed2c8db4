"""Runs over a quantised cache: formats are an axis, and outputs are judged over what is stored."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_run import write_tiny_run

from mla.cache import formats
from mla.cache.formats import Codec, Int8
from mla.reference import attention, small

WORDS = ("--backend", "torch", "-O", "device=cpu", "--dtype", "bfloat16", "--config", "tiny.json")
SHORT_RUN = ("--implementations", "mla", "--runs", "2", "--passes", "2", "--warmups", "0", "-o", "run.json")


@pytest.fixture
def run(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    write_tiny_run(tmp_path, kv_lora_rank=32, qk_rope_head_dim=32)

    def cases(*words: str) -> dict[str, Any]:
        done = bench(*WORDS, *SHORT_RUN, *words)
        assert done.code == 0, done.err
        return {
            case["point"]["cache_format"]: case for case in json.loads(Path("run.json").read_text())["cases"]
        }

    return cases


@pytest.mark.parametrize(
    "words",
    [("--batch-spec", "2q1s40"), ("--op", "write_latent"), ("--op", "latent_attention", "--kv", "30")],
)
def test_formats_are_an_axis(run: Any, words: tuple[str, ...]) -> None:
    cases = run(*words, "-a", "cache_format=bf16,fp8_ds_mla,q8_0")
    assert {case["check"]["status"] for case in cases.values()} == {"ok"}
    moved = {name: case["cost"]["bytes"] for name, case in cases.items()}
    assert moved["q8_0"] < moved["fp8_ds_mla"] < moved["bf16"]
    held = {name: case["memory"]["cache_bytes"] for name, case in cases.items()}
    assert held["q8_0"] * 128 == held["bf16"] * 68
    errors = {name: case.get("format_error") for name, case in cases.items()}
    assert errors["bf16"] is None
    assert 0 < errors["q8_0"] < errors["fp8_ds_mla"] < 0.03


def attends_half_a_code_beside(rows: torch.Tensor, codec: Codec | None) -> torch.Tensor:
    """Return latents that err by less than the format does: a kernel's error, which no format excuses."""
    right = formats.latents(rows, codec)
    return right if codec is None else right * (1 + 2.0**-9)


def writes_the_next_code(c: int, r: int) -> Codec:
    """Return a codec whose codes of every other number are one too large."""
    codec: Any = Int8(c, r)
    step = torch.tensor([1, 0] * ((c + r) // 2) + [0] * 8, dtype=torch.uint8)
    return SimpleNamespace(encode=lambda kv, pe: codec.encode(kv, pe) + step)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("module", "name", "wrong", "reason"),
    [
        (attention, "latents", attends_half_a_code_beside, "output rows are too far from the oracle"),
        (small, "codec_of", lambda name, c, r: writes_the_next_code(c, r), "rows of its cached latents of"),
    ],
)
@pytest.mark.parametrize("spec", ["2q1s40", "2q30s40"])
def test_errors_of_a_kernel_are_not_taken_for_those_of_the_format(
    bench: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spec: str,
    module: Any,
    name: str,
    wrong: Any,
    reason: str,
) -> None:
    write_tiny_run(tmp_path, kv_lora_rank=32, qk_rope_head_dim=32)
    words = [word for word in WORDS if word != "bfloat16"]
    words.insert(words.index("--dtype") + 1, "float32")
    words += [*SHORT_RUN, "--cache-format", "int8", "--batch-spec", spec, "--attention", "absorbed"]
    assert bench(*words).code == 0
    monkeypatch.setattr(module, name, wrong)
    done = bench(*words)
    assert done.code == 4, done.out + done.err
    (case,) = json.loads(Path("run.json").read_text())["cases"]
    assert reason in case["check"]["reason"]


def test_what_has_no_formats_is_refused(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny_run(tmp_path)
    layers = bench(*WORDS, "--batch-spec", "2q1s40", "--cache-format", "fp8", "--layers", "2")
    assert layers.code == 2
    assert "a cache format is measured with one layer" in layers.err
    sweep = ("--batch-spec", "2q1s40", "-a", "cache_format=bf16,fp8", "--implementations", "mla,transformers")
    foreign = bench(*WORDS, *sweep, "--dry-run")
    assert foreign.code == 2, "before anything is measured"
    assert "error: transformers has a cache of its own, without formats: leave cache_format" in foreign.err
