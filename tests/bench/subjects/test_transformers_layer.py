"""`transformers` beside our layer, for families whose attention differs from DeepSeek-V3's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers_peer import needs_transformers

from mla.bench import results
from mla.bench.subjects.transformers_layer import TransformersMissing, classes_of

TINY_MODEL = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
FACTORS = [1.0, 1.5, 2.0, 3.0]
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {},
    "glm4_moe_lite": {"v_head_dim": 24},
    "minicpm3": {
        "max_position_embeddings": 4096,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": FACTORS,
            "long_factor": FACTORS,
            "original_max_position_embeddings": 4096,
        },
    },
    "longcat_flash": {"mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    "mistral4": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 8.0,
            "original_max_position_embeddings": 4,  # so that the histories of the workload pass it
            "llama_4_scaling_beta": 0.5,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        }
    },
    "kimi_linear": {"q_lora_rank": None, "mla_use_nope": True},
}


@needs_transformers
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_runs_beside_its_own_class(
    bench: Any, small: list[str], tmp_path: Path, family: str
) -> None:
    config = {"model_type": family, **TINY_MODEL, **FAMILIES[family]}
    (tmp_path / "family.json").write_text(json.dumps(config))
    names = ["--implementations", "mla,transformers", "--dtype", "float32", "-o", "run.json"]
    shared = [word for word in small if word not in ("--config", "tiny.json")]
    done = bench("--backend", "cpu", *shared, "--config", str(tmp_path / "family.json"), *names)
    assert done.code == 0, done.err
    cases = results.decode(Path("run.json").read_bytes()).cases
    assert {case.check.status for case in cases} == {"ok"}
    assert max(case.agreement[0].relative_difference for case in cases) < 1e-5


def test_a_torch_that_transformers_refuses_is_named_before_anything_runs(
    bench: Any, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_torch_available", lambda: False)
    done = bench("--backend", "cpu", *small, "--implementations", "mla,transformers")
    assert done.code == 2
    assert done.error == (
        f"error: implementation 'transformers': transformers {transformers.__version__} does not work with "
        f"torch {torch.__version__}: install a newer torch."
    )


@needs_transformers
def test_a_release_without_the_class_of_a_config_is_named() -> None:
    with pytest.raises(TransformersMissing, match=r"a release that has transformers\.models\.nobodys \("):
        classes_of("nobodys", "Nobodys")


@needs_transformers
def test_use_mla_takes_turns_with_transformers_itself(bench: Any, small: list[str]) -> None:
    """With a stock cache and with pages."""
    where = "benchmarks.transformers.layers"
    names = f"{where}:UseMla,{where}:UseMlaPaged,transformers"
    done = bench("--backend", "cpu", *small, "--implementations", names, "-o", "run.json")
    assert done.code == 0, done.err
    cases = results.decode(Path("run.json").read_bytes()).cases
    assert {case.check.status for case in cases} == {"ok"}
    weights = {case.implementation: case.memory.weight_bytes for case in cases}
    assert len(weights) == 3
    assert weights[f"{where}:UseMla"] > weights["transformers"], "kv_b_proj is kept twice"
