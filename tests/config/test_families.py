"""Families as data: published configs give the right numbers, and what is not MLA as known is refused."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers_peer import needs_transformers

from mla import MLAConfig
from mla.config import LongRopeScaling, QueryScaling, YarnScaling
from mla.config.families import (
    ALIASES,
    CHANGES,
    FAMILIES,
    REFUSED,
    find_family,
    language_model,
    mla_layers,
    of_whole,
)
from mla.config.presets import PRESETS
from mla.errors import ConfigError

# Keys of each checkpoint's config.json that concern attention, as far as the named place gives them.
PUBLISHED: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "data" / "published_configs.json").read_text()
)
V3 = {"model_type": "deepseek_v3", "hidden_size": 64, "num_attention_heads": 4, "kv_lora_rank": 32}

# hidden, heads, q rank, latent, n, r, v, theta
NUMBERS: dict[str, tuple[Any, ...]] = {
    "deepseek-v2-lite": (2048, 16, None, 512, 128, 64, 128, 1e4),
    "deepseek-v2": (5120, 128, 1536, 512, 128, 64, 128, 1e4),
    "deepseek-v3": (7168, 128, 1536, 512, 128, 64, 128, 1e4),
    "deepseek-v3.1": (7168, 128, 1536, 512, 128, 64, 128, 1e4),
    "deepseek-r1": (7168, 128, 1536, 512, 128, 64, 128, 1e4),
    "deepseek-v3.2": (7168, 128, 1536, 512, 128, 64, 128, 1e4),
    "kimi-k2": (7168, 64, 1536, 512, 128, 64, 128, 5e4),
    "kimi-k2.5": (7168, 64, 1536, 512, 128, 64, 128, 5e4),
    "glm-4.7-flash": (2048, 20, 768, 512, 192, 64, 256, 1e6),
    "glm-5": (6144, 64, 2048, 512, 192, 64, 256, 1e6),
    "glm-5.2": (6144, 64, 2048, 512, 192, 64, 256, 8e6),
    "youtu-llm-2b": (2048, 16, 1536, 512, 128, 64, 128, 1.6e6),
    "a.x-k1": (7168, 64, 1536, 512, 128, 64, 128, 1e4),
    "sarvam-105b": (4096, 64, None, 512, 128, 64, 128, 1e4),
    "minicpm3-4b": (2560, 40, 768, 256, 64, 32, 64, 1e4),
    "longcat-flash": (6144, 64, 1536, 512, 128, 64, 128, 1e7),
    "mistral-small-4": (4096, 32, 1024, 256, 64, 64, 128, 1e4),
    "kimi-linear-48b": (2304, 32, None, 512, 128, 64, 128, None),
    "kimi-k3": (7168, 96, 1536, 512, 128, 64, 128, None),
    "ling-3-flash": (2560, 32, None, 512, 128, 64, 128, 6e6),
}
# Factor on the softmax scale of 1 / sqrt(n + r), and on cos and sin.
FACTORS = {
    "deepseek-v2-lite": (1.589626, 1.0),
    "deepseek-v2": (1.589626, 1.0),
    **dict.fromkeys(
        ("deepseek-v3", "deepseek-v3.1", "deepseek-v3.2", "deepseek-r1", "sarvam-105b"), (1.873854, 1.0)
    ),
    "kimi-k2": ((0.1 * 3.4657359 + 1) ** 2, 1.0),  # ln 32
    "kimi-k2.5": ((0.1 * 4.1588831 + 1) ** 2, 1.0),  # ln 64
    "a.x-k1": (1.0, 0.1 * 1.3862944 + 1),  # ln 4; its mscale_all_dim is 0
    "mistral-small-4": ((0.1 * 4.8520303 + 1) ** 2, 1.0),  # ln 128
}


def read(name: str) -> MLAConfig:
    return MLAConfig.from_dict(PUBLISHED[name]["config"])


def test_every_preset_has_its_published_config_and_numbers() -> None:
    assert set(PRESETS) == set(PUBLISHED) == set(NUMBERS)
    served = {PRESETS[name].values["model_type"] for name in PRESETS}
    assert {ALIASES.get(name, name) for name in served} == set(FAMILIES)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_published_config_gives_the_right_numbers(name: str) -> None:
    config = read(name)
    dims = (config.hidden_size, config.num_attention_heads, config.q_lora_rank, config.kv_lora_rank)
    heads = (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim)
    assert (*dims, *heads, config.rope_theta) == NUMBERS[name]
    softmax, magnitude = FACTORS.get(name, (1.0, 1.0))
    assert config.softmax_scale == pytest.approx(config.qk_head_dim**-0.5 * softmax, rel=1e-6)
    computed = config.rope_scaling.magnitude() if config.rope_scaling else 1.0
    assert computed == pytest.approx(magnitude, rel=1e-6)
    assert config.rms_norm_eps == (1e-5 if name == "kimi-k3" else 1e-6)
    assert config.output_gate == {"kimi-k3": "element", "ling-3-flash": "head"}.get(name)
    assert not config.attention_bias


def test_what_sets_a_family_apart_is_read() -> None:
    mini, longcat, mistral = (read(name) for name in ("minicpm3-4b", "longcat-flash", "mistral-small-4"))
    assert not mini.rope_interleave
    assert isinstance(mini.rope_scaling, LongRopeScaling)
    assert len(mini.rope_scaling.factors) == 16
    assert longcat.q_latent_scale == 2.0
    assert longcat.kv_latent_scale == pytest.approx(12**0.5)
    assert mistral.query_scaling == QueryScaling(0.1, 8192)
    assert read("kimi-k2").rope_scaling == YarnScaling(32.0, 4096, 1.0, 1.0, 1.0, 1.0)
    assert read("kimi-k2.5").rope_scaling == YarnScaling(64.0, 4096, 32.0, 1.0, 1.0, 1.0)
    assert read("kimi-linear-48b").rope_theta is None
    others = [
        read(name) for name in PRESETS if name not in ("minicpm3-4b", "longcat-flash", "mistral-small-4")
    ]
    for config in others:
        assert config.rope_interleave
        assert (config.q_latent_scale, config.kv_latent_scale, config.query_scaling) == (1.0, 1.0, None)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_equals_its_published_config(name: str) -> None:
    assert MLAConfig.preset(name) == replace(read(name), name=name)
    assert PRESETS[name].source.startswith("https://huggingface.co/")
    assert PRESETS[name].source.endswith("/config.json")


@needs_transformers
@pytest.mark.parametrize("kind", sorted({*FAMILIES} - {"kimi_k3"}))
def test_an_absent_key_means_what_the_class_of_transformers_says(kind: str) -> None:
    """Only the three keys without which a config is no MLA layer are given."""
    theirs = AutoConfig.for_model(kind)
    given = {key: getattr(theirs, key) for key in ("hidden_size", "num_attention_heads", "kv_lora_rank")}
    ours = MLAConfig.from_dict({"model_type": kind, **given})
    for key in ("q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "attention_bias"):
        assert getattr(ours, key) == getattr(theirs, key), key
    if FAMILIES[kind].rotates:
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        kinds = {type(None): "default", YarnScaling: "yarn"}
        assert kinds[type(ours.rope_scaling)] == theirs.rope_parameters["rope_type"]
    if FAMILIES[kind].scales_queries:
        assert ours.query_scaling == QueryScaling(
            theirs.rope_parameters["llama_4_scaling_beta"],
            theirs.rope_parameters["original_max_position_embeddings"],
        )


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_latent_norms_keep_1e_6_whatever_the_config_says(kind: str) -> None:
    config = MLAConfig.from_dict({**V3, "model_type": kind, "q_lora_rank": 24, "rms_norm_eps": 1e-5})
    assert config.rms_norm_eps == (1e-5 if kind == "kimi_k3" else 1e-6)  # which engines give to those norms
    unnamed = {key: value for key, value in V3.items() if key != "model_type"}
    assert MLAConfig.from_dict({**unnamed, "rms_norm_eps": 1e-5}).rms_norm_eps == 1e-5


# Heads, width, top-k, whether its rotary channels are interleaved, and layers with an indexer.
INDEXERS = {
    "deepseek-v3.2": (64, 128, 2048, False, 61, 62),
    "glm-5": (32, 128, 2048, True, 78, 79),
    "glm-5.2": (32, 128, 2048, True, 78, 22),
}


@pytest.mark.parametrize("name", PRESETS)
def test_an_indexer_is_read_where_there_is_one(name: str) -> None:
    config = read(name)
    if name not in INDEXERS:
        assert (config.index_topk, config.index_n_heads, config.indexer_types) == (0, 0, ())
        return
    *numbers, layers, full = INDEXERS[name]
    indexer = (config.index_n_heads, config.index_head_dim, config.index_topk, config.indexer_rope_interleave)
    assert indexer == tuple(numbers)
    assert len(config.index_layers(layers + 1)) == full  # with the one that guesses tokens
    assert config.of_layer(0).index_n_heads == numbers[0]


def test_layers_that_share_a_selection_are_found_as_transformers_finds_them() -> None:
    glm = {**V3, "model_type": "glm_moe_dsa", "num_hidden_layers": 11}
    for keys in (
        {},
        {"index_topk_freq": 1},
        {"index_topk_freq": 4},
        {"index_topk_freq": 4, "index_skip_topk_offset": 3},
        {"index_topk_freq": 3, "index_skip_topk_offset": 0},
        {"index_topk_pattern": "FSSFSFFSSSF"},
        {"index_topk_pattern": ["full", "shared"] * 5 + ["full"], "index_topk_freq": 4},
        {"indexer_types": ["full", "shared"] * 5 + ["full"], "index_topk_freq": 4},
    ):
        types = AutoConfig.for_model("glm_moe_dsa", num_hidden_layers=11, **keys).indexer_types
        if types[0] != "full":
            continue
        full = tuple(layer for layer, kind in enumerate(types) if kind == "full")
        assert MLAConfig.from_dict({**glm, **keys}).index_layers(11) == full, keys
    with pytest.raises(ConfigError, match="index_topk_freq needs num_hidden_layers, and"):
        MLAConfig.from_dict({**V3, "model_type": "glm_moe_dsa", "index_topk_freq": 4})


def test_an_indexer_whose_rotary_layout_is_another_is_refused() -> None:
    """The classes of `transformers` know one, engines go by the key: it is unclear which is meant."""
    for kind, layout in (("deepseek_v32", False), ("glm_moe_dsa", True)):
        given = {**V3, "model_type": kind, "indexer_rope_interleave": layout}
        assert MLAConfig.from_dict(given).indexer_rope_interleave == layout
        with pytest.raises(ConfigError, match=f"indexer_rope_interleave {not layout} is not supported"):
            MLAConfig.from_dict({**given, "indexer_rope_interleave": not layout})
        with pytest.raises(ConfigError, match="index_topk must not be null in this family"):
            MLAConfig.from_dict({**V3, "model_type": kind, "index_topk": None})


def test_a_config_may_name_its_architecture_only() -> None:
    """As LongCat's published files do: read without its scales it would be silently wrong."""
    assert "model_type" not in PUBLISHED["longcat-flash"]["config"]
    assert read("longcat-flash").model_type == "longcat_flash"
    for kind, family in FAMILIES.items():
        values = {**V3, "model_type": None, "q_lora_rank": 24, "architectures": [family.architecture]}
        assert MLAConfig.from_dict(values).model_type == kind


@pytest.mark.parametrize("suffix", ["", "_text"])
@pytest.mark.parametrize("kind", [kind for kind in REFUSED if kind.islower()])
def test_a_family_with_another_attention_is_refused_by_name(kind: str, suffix: str) -> None:
    with pytest.raises(ConfigError) as info:
        MLAConfig.from_dict({**V3, "model_type": kind + suffix})
    assert str(info.value) == (
        f"config '{kind}{suffix}': model type '{kind}{suffix}' is not supported: {REFUSED[kind]}."
    )


@pytest.mark.parametrize("kind", ["deepseek_ocr2", "glm5_next"])
def test_a_refused_wrapper_is_refused_whatever_it_wraps(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"model type '{kind}' is not supported"):
        MLAConfig.from_dict({"model_type": kind, "text_config": {**V3, "model_type": "kimi_linear"}})
    with pytest.raises(ConfigError, match="model type 'deepseek_v4' is not supported"):
        MLAConfig.from_dict({"model_type": "some_vl", "text_config": {"model_type": "deepseek_v4"}})


def test_kimi_k3_is_known_by_its_wrapper_and_by_its_part() -> None:
    """Its language model calls itself kimi_linear, which has no gate, and other latent norms."""
    whole = read("kimi-k3")
    part = PUBLISHED["kimi-k3"]["config"]["text_config"]
    assert MLAConfig.from_dict(part) == whole == MLAConfig.from_dict({**part, "model_type": "kimi_k3"})
    assert (whole.model_type, whole.gate_width, whole.softmax_scale) == ("kimi_k3", 96 * 128, 192**-0.5)
    plain = {**part, "mla_use_output_gate": False}
    assert MLAConfig.from_dict(plain) == replace(
        whole, name="kimi_linear", model_type="kimi_linear", output_gate=None, rms_norm_eps=1e-6
    )
    wrapped = MLAConfig.from_dict({"model_type": "kimi_k3", "text_config": plain})
    assert (wrapped.output_gate, wrapped.rms_norm_eps) == (None, 1e-5)
    with pytest.raises(ConfigError, match="mla_use_nope False is not supported; True is"):
        MLAConfig.from_dict({**part, "mla_use_nope": False})


def test_the_gate_of_ling_has_the_shape_that_its_config_names() -> None:
    ling = {**V3, "model_type": "bailing_hybrid"}
    shapes = {"head_wise": ("head", 4), "element_wise": ("element", 4 * 128), None: (None, 0)}
    for kind, gate in shapes.items():
        config = MLAConfig.from_dict({**ling, "gated_attention_proj_granularity_type": kind})
        assert (config.output_gate, config.gate_width) == gate
    assert MLAConfig.from_dict(ling).output_gate == "head"
    with pytest.raises(ConfigError, match="output_gate must be null, 'head' or 'element', got 'token_wise'"):
        MLAConfig.from_dict({**ling, "gated_attention_proj_granularity_type": "token_wise"})


@pytest.mark.parametrize("kind", [kind for kind in REFUSED if not kind.islower()])
def test_an_architecture_with_another_attention_is_refused_by_name(kind: str) -> None:
    """Ling 2.5 has the model type of Ling 3, whose gate it lacks; LongCat with an indexer has none."""
    for model_type in ("bailing_hybrid", None):
        with pytest.raises(ConfigError) as info:
            MLAConfig.from_dict({**V3, "name": "x", "model_type": model_type, "architectures": [kind]})
        assert str(info.value) == f"config 'x': architecture '{kind}' is not supported: {REFUSED[kind]}."


def test_the_mla_layers_of_hybrid_models_are_counted_from_zero() -> None:
    part = PUBLISHED["kimi-k3"]["config"]["text_config"]
    assert mla_layers(part) == (*range(3, 92, 4), 92)
    assert mla_layers(PUBLISHED["ling-3-flash"]["config"]) == (5, 11, 17, 23, 29, 35, 41)
    assert mla_layers({"num_hidden_layers": 14, "layer_group_size": 6}) == (5, 11, 12, 13)
    assert mla_layers({"layer_types": ["linear_attention", "full_attention"] * 2}) == (1, 3)
    for values in (V3, {"layer_types": ["full_attention"]}, {"linear_attn_config": {"full_attn_layers": 3}}):
        assert mla_layers(values) is None


def test_an_unknown_family_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError) as info:
        MLAConfig.from_dict({**V3, "model_type": "deepseek_v33"})
    message = str(info.value)
    assert "model type 'deepseek_v33' is unknown" in message
    assert "Did you mean 'deepseek_v3'?" in message
    assert all(kind in message for kind in FAMILIES)
    assert "say so with model_type 'deepseek_v3'" in message
    for kind in (3, ["deepseek_v3"], True):
        with pytest.raises(ConfigError, match="is unknown"):
            MLAConfig.from_dict({**V3, "model_type": kind})


@pytest.mark.parametrize("key", ["text_config", "language_config", "llm_config"])
def test_a_wrapper_gives_its_language_model(key: str) -> None:
    inner = {**V3, "q_lora_rank": 24, "rope_theta": 5e5}
    outer = {"model_type": "some_vl", "hidden_size": 9, "rope_theta": 3.0, key: inner}
    assert MLAConfig.from_dict(outer) == MLAConfig.from_dict(inner)
    with pytest.raises(ConfigError, match="has no kv_lora_rank, so it does not describe an MLA layer"):
        MLAConfig.from_dict({key: {"model_type": "llama", "hidden_size": 9, "num_attention_heads": 1}})


@pytest.mark.parametrize("key", CHANGES)
def test_a_key_that_changes_attention_is_refused_where_it_is_set(key: str) -> None:
    for off in (None, False, 0, []):
        assert MLAConfig.from_dict({**V3, key: off}) == MLAConfig.from_dict(V3)
    for kind in ("deepseek_v3", None):
        with pytest.raises(ConfigError) as info:
            MLAConfig.from_dict({**V3, "model_type": kind, "name": "x", key: 128})
        assert str(info.value) == f"config 'x': {key} is set, so {CHANGES[key]}; that is not supported."


def objects(values: Any, path: str = "") -> list[tuple[str, dict[str, Any]]]:
    """The object itself and all in it, each with the path of its keys."""
    inner = values.items() if isinstance(values, dict) else enumerate(values)
    found = [(path, values)] if isinstance(values, dict) else []
    for key, value in inner:
        if isinstance(value, (dict, list)):
            found += objects(value, f"{path}{key}.")
    return found


# Names that no reader knows, each of another model's way to choose keys, and values that set them.
CHOOSING = {
    "index_window": 8, "dsa_layers": [1], "use_sparse_attn": True, "windowSize": 64, "attn_topk": 2,
    "top_k_blocks": 9, "compress_ratios": [4, 128], "kv_share_every": 2, "cross_layer_sharing": True,
    "attention_chunk_size": 8192, "sink_tokens": 4, "swa_heads": 3, "nsa": "on", "index_kpool": 16,
    "dsa_config": {"layers": [1], "topk": {"k": 9}},
}  # fmt: skip


def is_read(config: dict[str, Any], place: dict[str, Any], key: str) -> bool:
    """Whether this object is the language model's and its family's table has the key."""
    family = find_family("x", of_whole(config, language_model(config)))[1]
    return place is language_model(config) and key in {*family.ignores, *family.demands}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_key_that_chooses_what_queries_see_is_refused_by_its_path_at_every_depth(name: str) -> None:
    """In every published config, and in one more object of it, in a list."""
    count = len(objects(PUBLISHED[name]["config"]))
    for key, value in {**CHOOSING, **dict.fromkeys(CHANGES, 128)}.items():
        for number in range(count + 1):
            config = json.loads(
                json.dumps({**PUBLISHED[name]["config"], "name": "x", "more": [[0], {"a": 1}]})
            )
            path, place = objects(config)[number]
            if key in place or path.startswith("vision_config"):
                continue
            place[key] = value
            if is_read(config, place, key):
                continue
            with pytest.raises(ConfigError) as info:
                MLAConfig.from_dict(config)
            inner = ".topk" if key == "dsa_config" else ""
            assert str(info.value).startswith(f"config 'x': {path}{key}{inner} is set, so "), info.value
            place[key] = type(value)() if key in CHOOSING and "rope" not in path else None
            MLAConfig.from_dict(config)


def test_keys_that_choose_nothing_are_read_past() -> None:
    """Experts, sampling, placeholders and what describes no layer of the language model."""
    keys = {
        "n_shared_experts": 1, "num_shared_experts": 1, "moe_shared_expert_intermediate_size": 512,
        "topk_group": 4, "topk_method": "noaux_tc", "norm_topk_prob": True, "moe_topk": 12,
        "share_expert_swiglu_limit_list": [1],
        "top_k": 50, "chunk_size_feed_forward": 1, "image_token_index": 5, "max_window_layers": 28,
        "vision_config": {"window_size": 8, "more": [{"index": 1}]}, "id2label": {"index": "label"},
        "quantization_config": {"sparsity_config": {"format": "dense"}, "quant_method": "compressed-tensors"},
    }  # fmt: skip
    for key, value in keys.items():
        for outer in (V3, {"text_config": V3}):
            assert MLAConfig.from_dict({**outer, key: value}) == MLAConfig.from_dict(V3)
        if "config" not in key and key != "id2label":
            assert MLAConfig.from_dict({"text_config": {**V3, key: value}}) == MLAConfig.from_dict(V3)


def test_a_config_that_holds_itself_is_refused() -> None:
    config: dict[str, Any] = {**V3, "name": "x"}
    config["a"] = [config]
    with pytest.raises(ConfigError, match=r"is set, so it is nested deeper than 20 objects"):
        MLAConfig.from_dict(config)


LONGCAT = {"mla_scale_q_lora": True, "mla_scale_kv_lora": True, "attention_method": "mla"}
HEADS = {"num_key_value_heads": 4, "head_dim": 576, "qk_head_dim": 192, "max_position_embeddings": 8}


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("sarvam_mla", {"use_qk_norm": True}),
        ("deepseek_v3", {"sliding_window": 4096, "use_sliding_window": False}),
        ("longcat_flash", LONGCAT),
        ("deepseek_v3", HEADS),
        ("deepseek_v3", {"partial_rotary_factor": 1.0}),
        ("mistral4", {"partial_rotary_factor": 0.5}),  # of n + r, which are 64 each
    ],
    ids=str,
)
def test_keys_that_change_nothing_in_a_family(kind: str, keys: dict[str, Any]) -> None:
    """It knows them, they say what holds anyway, or no number depends on them."""
    plain = {**V3, "q_lora_rank": 24, "model_type": kind}
    assert MLAConfig.from_dict({**plain, **keys}) == MLAConfig.from_dict(plain)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 2**64}, "num_hidden_layers must be an integer of 0 to 65535, got 18446744"),
        ({"index_topk_freq": "4"}, "index_topk_freq is set, so it may change which keys a query sees"),
        (
            {"model_type": "glm_moe_dsa", "index_topk_freq": 4.0},
            "index_topk_freq must be an integer of 0 to 65535, got 4.0",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types names 'sliding_attention'"),
        (
            {"layer_types": ["indexed_attention"]},
            "layer_types names 'indexed_attention'; that is not supported",
        ),
        ({"use_mla": False}, "use_mla False is not supported; True is."),
        ({"attention_method": "LSA"}, "attention_method 'LSA' is not supported; 'MLA' is."),
        ({"model_type": "kimi_linear", "mla_use_nope": False}, "mla_use_nope False is not supported; True"),
        (
            {"model_type": "longcat_flash", "q_lora_rank": 24, "mla_scale_q_lora": False},
            "mla_scale_q_lora False is not supported; True is.",
        ),
        ({"model_type": "longcat_flash", "q_lora_rank": None}, "q_lora_rank must not be null in this"),
        ({"model_type": "axk1", "q_lora_rank": None}, "q_lora_rank must not be null in this family."),
        ({"num_key_value_heads": 2}, "num_key_value_heads 2 is not 4, num_attention_heads: heads share"),
        ({"qk_head_dim": 128}, "qk_head_dim 128 is not 192, qk_nope_head_dim + qk_rope_head_dim."),
        ({"q_latent_scale": 2.0, "q_lora_rank": None}, "q_latent_scale needs a q_lora_rank"),
        ({"kv_latent_scale": 0}, "kv_latent_scale must be a positive number, got 0."),
        (
            {"model_type": "mistral4", "rope_parameters": {"type": "default"}},
            "rope_parameters needs a number 'llam",
        ),
        (
            {"model_type": "mistral4", "rope_scaling": {"type": "default", "llama_4_scaling_beta": 1}},
            "rope_scaling needs a positive number 'original_max_position_embeddings', got None.",
        ),
        ({"model_type": "mistral4", "partial_rotary_factor": 1.0}, "partial_rotary_factor 1.0 of 128"),
    ],
    ids=str,
)
def test_what_a_family_does_not_compute_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as info:
        MLAConfig.from_dict({**V3, **values, "name": "x"})
    assert str(info.value).startswith(f"config 'x': {message}")


def test_a_query_scale_of_zero_is_none() -> None:
    rope = {"type": "yarn", "factor": 2, "original_max_position_embeddings": 64, "llama_4_scaling_beta": 0}
    assert MLAConfig.from_dict({**V3, "model_type": "mistral4", "rope_scaling": rope}).query_scaling is None


VALUES = st.sampled_from(
    [
        None,
        True,
        False,
        0,
        -1,
        2,
        2.5,
        64,
        "64",
        "yarn",
        [],
        [1],
        {},
        {"a": 1},
        [["F"]],
        "FSS",
        2**64,
        10**400,
    ]
)
KEYS = ("model_type", "architectures", "text_config", "num_key_value_heads", "qk_head_dim", "hidden_size")
KEYS = (*KEYS, "q_lora_rank", "v_head_dim", "rms_norm_eps", "attention_bias", "rope_interleave", "use_mla")
KEYS = (*KEYS, "attention_method", "kv_latent_scale", "partial_rotary_factor", *list(CHANGES)[:3])
COUNTS = ("num_hidden_layers", "index_topk_freq", "index_skip_topk_offset", "index_topk_pattern")
KEYS = (*KEYS, *COUNTS, "layer_group_size", "num_nextn_predict_layers", "layer_types", "linear_attn_config")


@example(kind="longcat_flash", change={"hidden_size": 10**400}, rank=24)
@example(kind="glm_moe_dsa", change={"num_hidden_layers": 2**64, "index_topk_freq": 4}, rank=24)
@example(kind="glm_moe_dsa", change={"index_topk_pattern": 5}, rank=24)
@example(kind="deepseek_v3", change={"architectures": {"a": 1}, "model_type": None}, rank=24)
@settings(deadline=None, max_examples=400)
@given(
    kind=st.sampled_from([*FAMILIES, *REFUSED, "kimi_k2", "x"]) | VALUES,
    change=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4),
    rank=st.sampled_from([24, None]),
)
def test_nothing_but_a_config_error_escapes(kind: Any, change: dict[str, Any], rank: int | None) -> None:
    with contextlib.suppress(ConfigError):
        MLAConfig.from_dict({**V3, "q_lora_rank": rank, "model_type": kind, **change})
