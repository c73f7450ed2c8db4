"""Checkpoints of models with an indexer: its tensors where the layer has one, and none where it shares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checkpoint_maker as maker
import pytest
import torch
from checkpoint_checks import same
from checkpoint_maker import INDEXER, named, plain, values_of

import mla
from mla import MLAConfig
from mla.checkpoint import CheckpointError, read_layer

# Full at 0, 1, 2 and 6, as GLM-5.2's files begin; layer 7 guesses tokens, and has an indexer of its own.
GLM = {
    "model_type": "glm_moe_dsa",
    "rope_scaling": None,
    "num_hidden_layers": 7,
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
    "indexer_rope_interleave": True,
    **INDEXER,
}
FULL = (0, 1, 2, 6, 7)
VALUES = values_of("tiny", **GLM)


def weights(layer: int, everywhere: bool = False) -> dict[str, torch.Tensor]:
    """Return a layer's tensors; `everywhere`, with an indexer's whether it has one or not."""
    state = plain(VALUES, seed=layer)
    keeps = everywhere or layer in FULL
    return {name: weight for name, weight in state.items() if keeps or not name.startswith("indexer.")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path)


def write(folder: Path, everywhere: bool = False, **changes: Any) -> Path:
    shards = [named(weights(layer, everywhere), f"model.layers.{layer}.self_attn.") for layer in range(8)]
    return maker.write(folder / "model", {**VALUES, **changes}, *shards, index=True)


@pytest.mark.parametrize("layer", range(8))
@pytest.mark.parametrize("everywhere", [False, True])
def test_each_layer_has_the_tensors_that_it_needs(tmp_path: Path, layer: int, everywhere: bool) -> None:
    """Some converters write an indexer into shared layers too, which nothing reads."""
    folder, config = write(tmp_path, everywhere), MLAConfig.from_dict(VALUES)
    stored = read_layer(folder, config, layer)
    same(stored, weights(layer))
    assert stored.config == config.of_layer(layer)
    built = mla.MLA.from_pretrained(folder, layer, dtype=torch.float32)
    assert built.config.index_n_heads == (2 if layer in FULL else 0)
    assert {*built.state_dict()} == {*weights(layer)}


def test_a_layer_that_should_have_an_indexer_and_has_none_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "index_topk_freq": 1}))
    with pytest.raises(CheckpointError, match=r"has no tensor 'indexer\.wq_b\.weight' next to"):
        mla.MLA.from_pretrained(folder, 3)


def test_an_indexer_that_the_config_does_not_announce_is_refused(folder: Path) -> None:
    dense = MLAConfig.from_dict(values_of("tiny"))
    with pytest.raises(CheckpointError, match="belongs to an indexer that picks the tokens to attend"):
        read_layer(folder, dense, 0)


def test_norms_in_float32_beside_fp8_are_read(tmp_path: Path) -> None:
    """As DeepSeek-V3.2's files have them; the weights of heads stay wide in any layer."""
    made = maker.LAYOUTS["deepseek-v3.2-fp8"].make(tmp_path / "model")
    state = {name: weight.float() if "k_norm" in name else weight for name, weight in made.state.items()}
    maker.write(tmp_path / "wide", made.values, named(state, maker.LAYER))
    layer = mla.MLA.from_pretrained(tmp_path / "wide", dtype=torch.bfloat16)
    for name, weight in layer.state_dict().items():
        assert torch.equal(weight.float(), state[name].float())
        assert (weight.dtype == torch.float32) == (name == "indexer.weights_proj.weight")


@pytest.mark.parametrize("name", ["wq_b.weight", "wk.weight"])
def test_an_indexer_s_fp8_needs_its_scale(tmp_path: Path, name: str) -> None:
    made = maker.LAYOUTS["deepseek-v3.2-fp8"].make(tmp_path / "model")
    state = dict(made.state)
    state[f"indexer.{name}"] = state[f"indexer.{name}"].to(torch.float8_e4m3fn)
    maker.write(tmp_path / "bare", made.values, named(state, maker.LAYER))
    with pytest.raises(CheckpointError, match="is FP8 but has no scale"):
        read_layer(tmp_path / "bare", made.config)
