"""`MLAConfig`: presets, reading config.json, and a named error for everything no layer can have."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mla import MLAConfig
from mla.config.presets import PRESETS
from mla.errors import ConfigError

MINIMAL = {"hidden_size": 64, "num_attention_heads": 4, "kv_lora_rank": 32}
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}


def test_a_config_shows_its_dimensions_and_what_is_not_default() -> None:
    assert repr(MLAConfig.preset("deepseek-v2-lite")) == (
        "MLAConfig('deepseek-v2-lite', hidden_size=2048, num_attention_heads=16, q_lora_rank=None, "
        "kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, "
        "rope_scaling=YarnScaling(factor=40, orig ... factor=None, truncate=True), "
        "model_type='deepseek_v2')"
    )


def test_an_unknown_preset_suggests_the_closest_and_lists_all() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown config 'deepsek-r1'\. Did you mean 'deepseek-r1'\?"
    ) as info:
        MLAConfig.preset("deepsek-r1")
    assert all(name in str(info.value) for name in PRESETS)
    with pytest.raises(ConfigError) as info:
        MLAConfig.preset("zzz")
    assert "Did you mean" not in str(info.value)


SPARSE = {"q_lora_rank": 24, "index_topk": 16, "index_n_heads": 2}


def test_layers_share_selections_as_their_model_says() -> None:
    kinds = ("full", "full", "shared", "full", "shared")
    config = MLAConfig(64, 4, **SPARSE, indexer_types=kinds, name="x")
    assert config.index_layers(7) == (0, 1, 3, 5, 6)  # what follows guesses tokens, and has its own
    assert config.index_layers(2) == (0, 1)
    first, shared = config.of_layer(3), config.of_layer(4)
    assert first == config.of_layer(6) == replace(config, indexer_types=())
    assert shared == replace(first, index_n_heads=0)
    assert shared.of_layer(0) == shared
    assert shared.index_layers(3) == ()
    assert not shared.is_ops_alone
    assert not shared.is_odd
    assert config.index_scale == 256**-0.5
    assert "index_topk=16, index_n_heads=2, indexer_types=('full', 'full', 'share" in repr(config)
    listed = MLAConfig(64, 4, **SPARSE, indexer_types=[*kinds], name="x")  # type: ignore[arg-type]
    assert listed == config
    assert hash(listed) == hash(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"index_topk": -1}, "index_topk must be an integer of at least 0, got -1"),
        ({"index_n_heads": True}, "index_n_heads must be an integer of at least 0, got True"),
        ({"index_head_dim": 32}, "index_head_dim must be at least 64, as qk_rope_head_dim, got 32"),
        ({"index_topk": 0}, "index_n_heads needs a positive index_topk"),
        ({"q_lora_rank": None}, "index_n_heads needs a positive index_topk and a q_lora_rank"),
        ({"indexer_rope_interleave": 1}, "indexer_rope_interleave must be true or false, got 1"),
        ({"indexer_types": ("full", "half")}, "indexer_types must list 'full' and 'shared', got "),
        ({"indexer_types": 3}, "indexer_types must list 'full' and 'shared', got 3"),
        ({"indexer_types": ("shared",)}, "indexer_types must begin with 'full'"),
    ],
    ids=str,
)
def test_an_indexer_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as info:
        MLAConfig(64, 4, **{**SPARSE, **fields}, name="x")
    assert str(info.value).startswith(f"config 'x': {message}")


def test_a_name_of_the_hub_suggests_its_preset() -> None:
    with pytest.raises(ConfigError, match=r"is not a file\. Use the preset 'deepseek-v3', this model's own"):
        MLAConfig.named("deepseek-ai/deepseek-v3")
    with pytest.raises(ConfigError, match="No such file or directory"):
        MLAConfig.named("deepseek-ai/unheard-of")


def test_what_is_no_mapping_is_no_config() -> None:
    with pytest.raises(ConfigError, match=r"from_dict\(\) takes the keys of a config\.json, got None"):
        MLAConfig.from_dict(None)  # type: ignore[arg-type]


def test_there_may_be_no_rotary_channels() -> None:
    config = MLAConfig.from_dict({**MINIMAL, "qk_rope_head_dim": 0})
    assert (config.latent_dim, config.qk_head_dim, config.softmax_scale) == (32, 128, 128**-0.5)


@pytest.mark.parametrize(("gate", "width"), [(None, 0), ("head", 4), ("element", 4 * 128)])
def test_an_output_gate_is_one_number_per_head_or_per_element(gate: str | None, width: int) -> None:
    config = MLAConfig.from_dict({**MINIMAL, "output_gate": gate})
    assert (config.gate_width, config.is_odd) == (width, gate is None)
    assert config.with_heads(2).gate_width == width // 2
    assert config.with_heads(2).with_heads(4) == config


@pytest.mark.parametrize("key", MINIMAL)
def test_a_missing_key_says_this_is_no_mla_layer(key: str) -> None:
    values = {name: value for name, value in MINIMAL.items() if name != key}
    with pytest.raises(
        ConfigError, match=f"config 'llama' has no {key}, so it does not describe an MLA layer"
    ):
        MLAConfig.from_dict({**values, "model_type": "llama"})


DIMENSIONS = ("hidden_size", "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim")
WRONG: list[tuple[dict[str, Any], str]] = [
    *(
        ({key: value}, f"{key} must be an integer of at least 1, got ")
        for key in DIMENSIONS
        for value in (0, -1, 1.5, "64", None, True)
    ),
    *(
        ({"output_gate": gate}, "output_gate must be null, 'head' or 'el")
        for gate in (True, "Head", 1, ["head"])
    ),
    ({"qk_rope_head_dim": 63}, "qk_rope_head_dim must be even, got 63"),
    ({"qk_rope_head_dim": -2}, "qk_rope_head_dim must be an integer of at least 0, got -2"),
    ({"rope_theta": None}, "rope_theta must be a positive number"),
    ({"rope_theta": "10000"}, "rope_theta must be a positive number"),
    ({"rms_norm_eps": None}, "rms_norm_eps must be a positive number"),
    ({"rope_scaling": {**YARN, "beta_fast": -1}}, "needs a positive number 'beta_fast', got -1"),
    ({"rope_scaling": {**YARN, "mscale": "1"}}, "needs a positive number 'mscale', got '1'"),
    ({"rope_scaling": {**YARN, "factor": float("nan")}}, "needs a positive number 'factor', got nan"),
    ({"attention_bias": "no"}, "attention_bias must be true or false, got 'no'"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=str)
def test_a_value_that_no_layer_can_have_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as info:
        MLAConfig.from_dict({**MINIMAL, **change})
    assert "config 'custom': " in str(info.value)
    assert message in str(info.value)


def test_a_directory_a_file_and_a_dict_are_read_alike(tmp_path: Path) -> None:
    values = {**MINIMAL, "q_lora_rank": 24, "rope_scaling": YARN, "name": "x"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    sources = (tmp_path, str(tmp_path), tmp_path / "config.json", values)
    configs = [MLAConfig.from_pretrained(source) for source in sources]
    assert all(config == configs[0] for config in configs)
    assert configs[0].q_lora_rank == 24


def test_a_config_read_from_disk_is_named_after_its_place(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**MINIMAL, "hidden_size": 0}))
    with pytest.raises(ConfigError) as info:
        MLAConfig.from_pretrained(tmp_path)
    assert f"config '{tmp_path}': hidden_size" in str(info.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "must hold a JSON object, got list"),
        ("\x00", "is not valid JSON"),
        (None, "cannot read config"),
    ],
)
def test_a_file_that_is_no_config_is_refused_by_name(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message) as info:
        MLAConfig.from_pretrained(tmp_path)
    assert str(tmp_path / "config.json") in str(info.value)
