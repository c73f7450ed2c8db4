"""What the loader reads: every layout, the right layer of it, with one rounding, lazily."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import checkpoint_maker as maker
import pytest
import torch
from checkpoint_checks import same
from checkpoint_maker import Made
from safetensors.torch import load_file, save_file

import mla
from mla.checkpoint import CheckpointError, StoredLayer, fingerprint, read_layer
from mla.checkpoint import folder as stored_module
from mla.checkpoint.folder import Facts
from mla.checkpoint.read import Location, choose
from mla.errors import WeightError
from mla.weights import weight_shapes

LAYOUTS = [(layout, size) for layout in maker.LAYOUTS for size in ("tiny", "ragged")]


@pytest.mark.parametrize(("layout", "size"), LAYOUTS)
def test_every_layout_is_read_bit_for_bit(layout: str, size: str, tmp_path: Path) -> None:
    made = maker.LAYOUTS[layout].make(tmp_path / "model", size)
    same(read_layer(made.folder, made.config, made.layer), made.state)
    if "." not in str(made.layer) and layout not in ("whole-model", "kimi-k3"):
        same(read_layer(made.folder, made.config), made.state)  # it is the only main layer


def test_a_layer_with_another_attention_is_refused_by_its_number(tmp_path: Path) -> None:
    """Kimi K3's config counts its layers from 1, and its linear layers have a g_proj, too."""
    made = maker.LAYOUTS["kimi-k3"].make(tmp_path / "model")
    other = made.state["g_proj.weight"]
    for layer, same_gate in ((3, True), (4, False)):
        stored = read_layer(made.folder, made.config, layer)
        assert torch.equal(stored["g_proj.weight"], other) == same_gate
    for layer in (0, 1, 2):
        with pytest.raises(CheckpointError, match=f"layer {layer} of .* from 0, are 3, 4"):
            read_layer(made.folder, made.config, layer)
    with pytest.raises(CheckpointError, match="no MLA weights of layer 5, only of layers 3, 4"):
        read_layer(made.folder, made.config, 5)
    lost = {Location("", None, "self_attn")}  # of a folder of one layer
    assert choose(lost, 4, Facts("", 5, (3, 4)), "x") == (*lost, 4)
    with pytest.raises(CheckpointError, match="layer 2 of checkpoint 'x' has another attention"):
        choose(lost, 2, Facts("", 5, (3, 4)), "x")


def test_the_fixtures_hold_what_their_names_promise() -> None:
    """Judge the judge: blocks that are cut off, that division would get wrong, and FP8 of every size."""
    values, block = maker.SIZES["ragged"]
    state = maker.fp8(maker.plain(values), block)
    shape, grid = (state[f"kv_a_proj_with_mqa.weight{end}"].shape for end in ("", "_scale_inv"))
    assert shape == (50, 72)
    assert grid == (4, 4)
    assert shape[0] // grid[0] != block[0]
    real = weight_shapes(mla.MLAConfig.from_dict(maker.values_of("real")))
    assert sum(2 * math.prod(shape) for shape in real.values()) == pytest.approx(374e6, rel=1e-3)
    numbers = torch.cat([weight.float().flatten() for weight in state.values() if weight.element_size() == 1])
    assert numbers.abs().max() == 448
    assert (numbers.abs() < 2**-2).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fp8_is_rounded_once_to_the_dtype_that_is_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    made = maker.LAYOUTS["fp8"].make(tmp_path / "model", "ragged")
    block = maker.SIZES["ragged"][1]
    stored = maker.fp8(maker.plain(made.values), block)
    expected = {name: weight.to(dtype) for name, weight in maker.dequantized(stored, block, dtype).items()}
    same(read_layer(made.folder, made.config, dtype=dtype), expected)
    layer = mla.MLA(made.config, dtype=dtype)
    layer.load_state_dict(read_layer(made.folder, made.config))
    same(layer.state_dict(), expected)


def test_weights_larger_than_a_block_are_read_in_blocks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = maker.LAYOUTS["fp8"].make(tmp_path / "model", "ragged")
    monkeypatch.setattr(stored_module, "BLOCK", 7 * 72)  # rows of blocks then lie across blocks of the scale
    same(read_layer(made.folder, made.config), made.state)


@pytest.mark.parametrize(
    ("shape", "block"),
    [((576, 7168), (128, 128)), ((144, 256), (128, 128)), ((5, 3), (128, 128)), ((300, 200), (64, 96))],
)
def test_blocks_are_those_that_are_declared(
    shape: tuple[int, int], block: tuple[int, int], tmp_path: Path
) -> None:
    """The first is R1's kv_a_proj: 5 rows of scales over 576 rows of weights, the last over one half."""
    rows, hidden = shape
    rope = 64 if rows > 64 else 2
    values = maker.values_of("tiny", hidden_size=hidden, kv_lora_rank=rows - rope, qk_rope_head_dim=rope)
    values["quantization_config"] = maker.quantization(block)
    stored = maker.fp8(maker.plain(values), block)
    assert stored["kv_a_proj_with_mqa.weight"].shape == shape
    folder = maker.write(tmp_path / "model", values, stored)
    same(read_layer(folder, mla.MLAConfig.from_dict(values)), maker.dequantized(stored, block))


def test_the_layer_comes_from_a_checkpoint_with_all_its_weights(tmp_path: Path) -> None:
    made = maker.LAYOUTS["fp8-sharded"].make(tmp_path / "model", "ragged")
    layer = mla.MLA.from_pretrained(made.folder, layer=3)
    same(layer.state_dict(), made.state)


def test_a_layer_can_be_cut_out_and_kept_with_the_models_config(tmp_path: Path) -> None:
    made = maker.LAYOUTS["fp8-sharded"].make(tmp_path / "model", "ragged")
    (tmp_path / "layer").mkdir()
    save_file(dict(read_layer(made.folder, made.config, 3)), tmp_path / "layer" / "model.safetensors")
    shutil.copy(made.folder / "config.json", tmp_path / "layer")
    same(mla.MLA.from_pretrained(tmp_path / "layer", layer=3).state_dict(), made.state)


# ------------------------------------------------------------------------------------------ which layer
def with_layers(folder: Path, *layers: int, **changes: Any) -> tuple[Path, mla.MLAConfig]:
    values = maker.values_of("tiny", **changes)
    tensors = {}
    for layer in layers:
        tensors |= maker.named(maker.plain(values, layer), f"model.layers.{layer}.self_attn.")
    return maker.write(folder, values, tensors), mla.MLAConfig.from_dict(values)


@pytest.mark.parametrize("layer", [0, 3, 60, 61, "3", "61"])
def test_a_layer_is_chosen_by_its_number(layer: int | str, tmp_path: Path) -> None:
    folder, config = with_layers(tmp_path / "model", 0, 3, 60, 61)
    same(read_layer(folder, config, layer), maker.plain(maker.values_of("tiny"), int(layer)))


@pytest.mark.parametrize(
    ("layers", "changes", "held"),
    [
        ((*range(4), 7, 9, 10, 61), {}, "0, 1, 2, 3, 7, 9, 10"),
        ((60, 61), {"num_nextn_predict_layers": 0}, "60, 61"),
        ((60, 61), {"num_nextn_predict_layers": None}, "60, 61"),
        ((61,), {}, "61"),
    ],
)
def test_a_layer_must_be_chosen_and_a_draft_layer_is_none_of_several(
    layers: tuple[int, ...], changes: dict[str, Any], held: str, tmp_path: Path
) -> None:
    """Layer 61 is one where the config announces it, and even alone it is not the main one."""
    folder, config = with_layers(tmp_path / "model", *layers, **changes)
    with pytest.raises(CheckpointError, match=f"holds layers {held}: choose one with layer=N"):
        read_layer(folder, config)


@pytest.mark.parametrize(
    ("layers", "changes", "asked"),
    [
        ((0, 1), {}, 7),
        ((0,), {}, 3),
        ((2,), {"num_hidden_layers": 1}, 3),
        ((0,), {"num_hidden_layers": 1}, -1),
    ],
)
def test_a_layer_that_is_not_there_is_refused(
    layers: tuple[int, ...], changes: dict[str, Any], asked: int, tmp_path: Path
) -> None:
    folder, config = with_layers(tmp_path / "model", *layers, **changes)
    with pytest.raises(CheckpointError, match=f"holds no MLA weights of layer {asked}, only of layers"):
        read_layer(folder, config, asked)


def test_one_of_two_attentions_must_be_named(tmp_path: Path) -> None:
    made = maker.LAYOUTS["two-attentions"].make(tmp_path / "model")
    same(read_layer(made.folder, made.config, "3.0"), maker.plain(made.values, seed=9))
    for asked in (None, 3, "3.2"):
        with pytest.raises(CheckpointError, match=r"layers 3\.0, 3\.1: choose one"):
            read_layer(made.folder, made.config, asked)
    stored = maker.LAYOUTS["full-names"].make(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"no MLA weights of layer 3\.1, only of layers 3: choose"):
        read_layer(stored.folder, stored.config, "3.1")


def test_attentions_under_two_prefixes_are_refused(tmp_path: Path) -> None:
    values = maker.values_of("tiny")
    both = maker.plain(values) | maker.named(maker.plain(values), maker.LAYER)
    folder = maker.write(tmp_path / "model", values, both)
    with pytest.raises(CheckpointError, match=r"under several names, '\*' and 'model.layers.N.self_attn.\*'"):
        read_layer(folder, mla.MLAConfig.from_dict(values), 3)


@pytest.mark.parametrize("place", ["model.mtp.layers.0.self_attn.", "model.layers.3.predictor.self_attn."])
def test_what_is_in_another_module_is_no_layer_of_the_model(place: str, tmp_path: Path) -> None:
    """One that drafts tokens beside the model, or one within the layer."""
    values = maker.values_of("tiny")
    other = maker.named(maker.plain(values, 5), place)
    folder = maker.write(tmp_path / "model", values, maker.named(maker.plain(values), maker.LAYER) | other)
    same(read_layer(folder, mla.MLAConfig.from_dict(values)), maker.plain(values))


def test_layers_of_another_attention_are_passed_over(tmp_path: Path) -> None:
    values = maker.values_of("tiny")
    linear = {
        "model.layers.0.self_attn.q_proj.weight": torch.ones(2),
        "model.layers.0.self_attn.beta": torch.ones(2),
    }
    folder = maker.write(tmp_path / "model", values, maker.named(maker.plain(values), maker.LAYER) | linear)
    config = mla.MLAConfig.from_dict(values)
    same(read_layer(folder, config), maker.plain(values))
    with pytest.raises(CheckpointError, match="no MLA weights of layer 0, only of layers 3"):
        read_layer(folder, config, 0)


# ------------------------------------------------------------------------------------------ lazily
def test_only_the_shards_of_the_layer_are_opened(tmp_path: Path) -> None:
    """A folder into which only this layer's shards were downloaded is enough; the others may be anything."""
    values = maker.values_of("tiny")
    state = maker.plain(values)
    shards = [
        maker.named(maker.plain(values, 1), "model.layers.2.self_attn."),
        maker.named(state, maker.LAYER),
    ]
    folder = maker.write(tmp_path / "model", values, *shards, {"lm_head.weight": torch.ones(2)}, index=True)
    (folder / "model-00001-of-000003.safetensors").unlink()
    (folder / "model-00003-of-000003.safetensors").write_bytes(b"not safetensors at all")
    (folder / "extra.safetensors").write_bytes(b"")
    same(read_layer(folder, mla.MLAConfig.from_dict(values), 3), state)


def test_nothing_is_read_before_a_weight_is_asked_for(tmp_path: Path) -> None:
    made = maker.LAYOUTS["fp8-sharded"].make(tmp_path / "model")
    seen: list[tuple[int, int]] = []
    layer = read_layer(made.folder, made.config, progress=lambda done, total: seen.append((done, total)))
    assert isinstance(layer, StoredLayer)
    assert (len(layer), "o_proj.weight" in layer, "o_proj.bias" in layer) == (len(made.state), True, False)
    assert layer.shape("o_proj.weight") == made.state["o_proj.weight"].shape
    assert not seen
    assert torch.equal(layer["kv_a_layernorm.weight"], made.state["kv_a_layernorm.weight"])
    assert seen[-1] == (made.state["kv_a_layernorm.weight"].nbytes, layer.nbytes)


def test_progress_counts_every_byte_of_the_layer_once(tmp_path: Path) -> None:
    made = maker.LAYOUTS["fp8-sharded"].make(tmp_path / "model", "ragged")
    seen: list[tuple[int, int]] = []
    layer = read_layer(made.folder, made.config, progress=lambda done, total: seen.append((done, total)))
    stored = maker.fp8(maker.plain(made.values), maker.SIZES["ragged"][1])
    size = sum(tensor.nbytes for tensor in stored.values())
    mla.MLA(made.config).load_state_dict(layer)
    assert seen[-1] == (size, size)
    assert all(total == size for _, total in seen)
    assert sorted(seen) == seen


def test_a_weight_that_cannot_be_read_leaves_the_layer_as_it_was(tmp_path: Path) -> None:
    """The last tensor that is packed is broken; all others would have been replaced by then."""
    made = maker.LAYOUTS["bare-names"].make(tmp_path / "model")
    layer = mla.MLA.from_pretrained(made.folder)
    other = {name: weight.clone() for name, weight in maker.plain(made.values, 1).items()}
    other["kv_b_proj.weight"][-1, -1] = torch.nan
    save_file(other, made.folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'kv_b_proj.weight' in .* holds NaN or infinity"):
        layer.load_state_dict(read_layer(made.folder, made.config))
    same(layer.state_dict(), made.state)
    fresh = mla.MLA(made.config)
    with pytest.raises(CheckpointError):
        fresh.load_state_dict(read_layer(made.folder, made.config))
    with pytest.raises(WeightError, match="no weights yet"):
        fresh.state_dict()


def test_a_folder_may_itself_be_a_link_and_hold_links_within(tmp_path: Path) -> None:
    made = maker.LAYOUTS["full-names"].make(tmp_path / "model")
    (made.folder / "weights").mkdir()
    (made.folder / "model.safetensors").rename(made.folder / "weights" / "data")
    (made.folder / "model.safetensors").symlink_to(os.path.join("weights", "data"))
    (tmp_path / "link").symlink_to(made.folder)
    same(read_layer(tmp_path / "link", made.config), made.state)


# --------------------------------------------------------------------------------- test fingerprint
# Two folders have the same fingerprint if they hold the same weights, however these lie in files.
def of(made: Made) -> dict[str, str]:
    return fingerprint(read_layer(made.folder, made.config, made.layer))


@pytest.mark.parametrize(
    ("names", "other"), [("full-names", "sharded"), ("bare-names", "whole-layer"), ("fp8", "fp8-sharded")]
)
def test_names_and_shards_are_no_difference(tmp_path: Path, names: str, other: str) -> None:
    first = of(maker.LAYOUTS[names].make(tmp_path / "one"))
    assert first == of(maker.LAYOUTS[other].make(tmp_path / "other"))
    assert len({*first.values()}) == len(first)


@pytest.mark.parametrize("layout", ["biases", "fp8"])
def test_whatever_was_trained_further_is_named(tmp_path: Path, layout: str) -> None:
    made = maker.LAYOUTS[layout].make(tmp_path / "model")
    before = of(made)
    (file,) = made.folder.glob("*.safetensors")
    tensors = load_file(file)
    trained = [key for key in tensors if key.endswith((".weight", ".bias")) and "q_b" not in key]
    for key in trained:
        changed = tensors[key].view(torch.uint8).clone()
        changed[-1].bitwise_xor_(128)  # the last row alone, in its signs
        save_file(tensors | {key: changed.view(tensors[key].dtype)}, file, metadata={"format": "pt"})
        after = of(made)
        assert [name for name in before if before[name] != after[name]] == [key.rpartition("self_attn.")[2]]


# ------------------------------------------------------------------------------------- test indexers
# Models with an indexer: its tensors are read where the layer has one, and none where it shares.
# Full at 0, 1, 2 and 6, as GLM-5.2's files begin; layer 7 guesses tokens, and has an indexer of its own.
GLM = {
    "model_type": "glm_moe_dsa",
    "rope_scaling": None,
    "num_hidden_layers": 7,
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
    "indexer_rope_interleave": True,
    **maker.INDEXER,
}
FULL = (0, 1, 2, 6, 7)
VALUES = maker.values_of("tiny", **GLM)


def weights(layer: int, everywhere: bool = False) -> dict[str, torch.Tensor]:
    """Return a layer's tensors; `everywhere`, with an indexer's whether it has one or not."""
    state = maker.plain(VALUES, seed=layer)
    keeps = everywhere or layer in FULL
    return {name: weight for name, weight in state.items() if keeps or not name.startswith("indexer.")}


def write(folder: Path, everywhere: bool = False, **changes: Any) -> Path:
    shards = [
        maker.named(weights(layer, everywhere), f"model.layers.{layer}.self_attn.") for layer in range(8)
    ]
    return maker.write(folder / "model", {**VALUES, **changes}, *shards, index=True)


@pytest.mark.parametrize("layer", range(8))
@pytest.mark.parametrize("everywhere", [False, True])
def test_each_layer_has_the_tensors_that_it_needs(tmp_path: Path, layer: int, everywhere: bool) -> None:
    """Some converters write an indexer into shared layers too, which nothing reads."""
    folder, config = write(tmp_path, everywhere), mla.MLAConfig.from_dict(VALUES)
    stored = read_layer(folder, config, layer)
    same(stored, weights(layer))
    assert stored.config == config.of_layer(layer)
    built = mla.MLA.from_pretrained(folder, layer, dtype=torch.float32)
    assert built.config.index_n_heads == (2 if layer in FULL else 0)
    assert {*built.state_dict()} == {*weights(layer)}


def test_a_layer_that_should_have_an_indexer_and_has_none_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, index_topk_freq=1)
    with pytest.raises(CheckpointError, match=r"has no tensor 'indexer\.wq_b\.weight' next to"):
        mla.MLA.from_pretrained(folder, 3)


def test_an_indexer_that_the_config_does_not_announce_is_refused(tmp_path: Path) -> None:
    dense = mla.MLAConfig.from_dict(maker.values_of("tiny"))
    with pytest.raises(CheckpointError, match="belongs to an indexer that picks the tokens to attend"):
        read_layer(write(tmp_path), dense, 0)


def test_norms_in_float32_beside_fp8_are_read(tmp_path: Path) -> None:
    """As DeepSeek-V3.2's files have them; the weights of heads stay wide in any layer."""
    made = maker.LAYOUTS["deepseek-v3.2-fp8"].make(tmp_path / "model")
    state = {name: weight.float() if "k_norm" in name else weight for name, weight in made.state.items()}
    maker.write(tmp_path / "wide", made.values, maker.named(state, maker.LAYER))
    layer = mla.MLA.from_pretrained(tmp_path / "wide", dtype=torch.bfloat16)
    for name, weight in layer.state_dict().items():
        assert torch.equal(weight.float(), state[name].float())
        assert (weight.dtype == torch.float32) == (name == "indexer.weights_proj.weight")


@pytest.mark.parametrize("name", ["wq_b.weight", "wk.weight"])
def test_an_indexer_s_fp8_needs_its_scale(tmp_path: Path, name: str) -> None:
    made = maker.LAYOUTS["deepseek-v3.2-fp8"].make(tmp_path / "model")
    state = dict(made.state)
    state[f"indexer.{name}"] = state[f"indexer.{name}"].to(torch.float8_e4m3fn)
    maker.write(tmp_path / "bare", made.values, maker.named(state, maker.LAYER))
    with pytest.raises(CheckpointError, match="is FP8 but has no scale"):
        read_layer(tmp_path / "bare", made.config)
