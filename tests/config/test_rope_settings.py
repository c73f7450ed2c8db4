"""Rotary keys of a config.json: the same numbers as `transformers` reads from them, or a named error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers_peer import DeepseekV3Attention, DeepseekV3Config, DeepseekV3RotaryEmbedding

from mla import MLAConfig
from mla.config import QueryScaling
from mla.errors import ConfigError
from mla.layer.rope import RotaryTable, inverse_frequencies, query_factors
from mla.reference.small import rotate

CPU = torch.device("cpu")
DIMS = {"hidden_size": 64, "num_attention_heads": 2, "q_lora_rank": None, "kv_lora_rank": 32}
DIMS = {**DIMS, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 16}
YARN = {"factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
R1 = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}
FACTORS = [1.0 + i / 7 for i in range(32)]
LONGROPE = {"type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS}
LENGTH = {"max_position_embeddings": 163840}


def ours(**keys: Any) -> tuple[torch.Tensor, float, float]:
    """Return frequencies, the factor on cos and sin, and the softmax scale."""
    config = MLAConfig.from_dict({**DIMS, "model_type": "deepseek_v3", **LENGTH, **keys})
    magnitude = config.rope_scaling.magnitude() if config.rope_scaling else 1.0
    return inverse_frequencies(config), magnitude, config.softmax_scale


def theirs(**keys: Any) -> tuple[torch.Tensor, float, float]:
    config = DeepseekV3Config(**{**DIMS, "num_key_value_heads": 2, **LENGTH, **keys})
    rotary = DeepseekV3RotaryEmbedding(config)
    return rotary.inv_freq, rotary.attention_scaling, DeepseekV3Attention(config, 0).scaling


def assert_same(**keys: Any) -> None:
    """Compare to one unit in the last place of a frequency, and to 1e-12 in the factors."""
    (frequencies, *factors), (expected, *truths) = ours(**keys), theirs(**keys)
    one_ulp = torch.nextafter(expected, torch.full_like(expected, torch.inf)) - expected
    assert ((frequencies - expected).abs() <= 2 * one_ulp).all()
    assert factors == pytest.approx(truths, rel=1e-12)


SPELLINGS: list[dict[str, Any]] = [
    {"rope_theta": 10000, "rope_scaling": {"type": "yarn", **R1}},  # R1 as published
    {"rope_theta": 10000, "rope_scaling": {"rope_type": "yarn", **R1}},
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000, **R1}},
    {"rope_parameters": {"type": "yarn", "rope_theta": 10000, **R1}},
    {"rope_parameters": {"rope_type": "yarn", "type": "nonsense", "rope_theta": 10000, **R1}},
    {"rope_scaling": {"type": "yarn", **R1}},
    {"rope_scaling": {}, "rope_parameters": {"type": "yarn", **R1}},
]


@pytest.mark.parametrize("keys", SPELLINGS, ids=str)
def test_every_spelling_of_one_scaling_is_the_same(keys: dict[str, Any]) -> None:
    assert_same(**keys)
    respelt, expected = ours(**keys), ours(**SPELLINGS[0])
    assert torch.equal(respelt[0], expected[0])
    assert respelt[1:] == expected[1:]


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"rope_theta": 500000.0},
        {"rope_scaling": None},
        {"rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_theta": 50000.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}, "rope_theta": 7.0},
        {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 163840}},
        {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 4096}},
        {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 4096, "factor": 8.0}},
        {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 4096, "factor": 1.0}},
        {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 4096, "attention_factor": 1.5}},
    ],
    ids=str,
)
def test_plain_rotation_and_longrope_with_one_list_agree(keys: dict[str, Any]) -> None:
    assert_same(**keys)
    assert ours(**keys)[2] == 192**-0.5


def test_rope_scaling_wins_over_rope_parameters_as_a_whole() -> None:
    parameters = {"rope_type": "yarn", "rope_theta": 50000.0, **R1, "factor": 8}
    keys = {"rope_scaling": {"type": "yarn", **YARN}, "rope_parameters": parameters}
    assert_same(**keys)
    assert torch.equal(ours(**keys)[0], ours(rope_scaling={"type": "yarn", **YARN})[0])


@pytest.mark.parametrize(
    ("change", "magnitude", "softmax"),
    [
        ({}, 1.3689, 1.0),
        ({"mscale_all_dim": 1.0}, 1.3689, 1.8739),
        ({"mscale": 1.0, "mscale_all_dim": 0}, 1.3689, 1.0),
        ({"mscale": 0, "mscale_all_dim": 1.0}, 1.3689, 1.8739),
        ({"mscale": None, "mscale_all_dim": None}, 1.3689, 1.0),
        ({"mscale": 0.707, "mscale_all_dim": 1.0}, 0.9210, 1.8739),
        ({"mscale": 0.707, "mscale_all_dim": 0.707}, 1.0, 1.5896),
        ({"attention_factor": 1.0}, 1.0, 1.0),
        ({"attention_factor": 1.25, "mscale": 0.707, "mscale_all_dim": 1.0}, 1.25, 1.8739),
        ({"attention_factor": None}, 1.3689, 1.0),
        ({"beta_fast": None, "beta_slow": None}, 1.3689, 1.0),
        ({"truncate": False}, 1.3689, 1.0),
        ({"truncate": True}, 1.3689, 1.0),
        ({"factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}, 1.0, 1.0),
        ({"partial_rotary_factor": 1.0}, 1.3689, 1.0),
        ({"beta_fast": 1.0, "beta_slow": 1.0}, 1.3689, 1.0),  # Kimi-K2: a ramp of one channel
        ({"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False}, 1.3689, 1.0),  # a ramp of none
        ({"beta_fast": 1.0, "beta_slow": 32.0}, 1.3689, 1.0),  # a ramp downwards
    ],
    ids=str,
)
def test_every_row_of_yarn_agrees(change: dict[str, Any], magnitude: float, softmax: float) -> None:
    keys = {"rope_scaling": {"type": "yarn", **YARN, **change}}
    assert_same(**keys)
    assert ours(**keys)[1] == pytest.approx(magnitude, abs=5e-5)
    assert ours(**keys)[2] == pytest.approx(192**-0.5 * softmax, rel=5e-5)


def test_an_original_length_of_the_config_wins_over_that_of_the_scaling() -> None:
    keys = {"rope_scaling": {"type": "yarn", **YARN}, "original_max_position_embeddings": 8192}
    assert_same(**keys)
    longer = ours(rope_scaling={"type": "yarn", **YARN, "original_max_position_embeddings": 8192})[0]
    assert torch.equal(ours(**keys)[0], longer)


@settings(deadline=None)
@given(
    factor=st.floats(1.0, 128.0),
    original=st.integers(64, 65536),
    betas=st.tuples(st.floats(0.5, 64.0), st.floats(0.5, 64.0)),
    theta=st.floats(100.0, 1e7),
    truncate=st.booleans(),
)
def test_any_yarn_agrees(
    factor: float, original: int, betas: tuple[float, float], theta: float, truncate: bool
) -> None:
    yarn = {"factor": factor, "original_max_position_embeddings": original, "truncate": truncate}
    assert_same(
        rope_theta=theta, rope_scaling={"type": "yarn", **yarn, "beta_fast": betas[0], "beta_slow": betas[1]}
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 40}}, "needs a positive number 'original_max_position"),
        ({"rope_scaling": {"type": "yarn", **YARN, "factor": None}}, "needs a positive number 'factor'"),
        ({"rope_scaling": {"type": "yarn", **YARN, "factor": "40"}}, "needs a positive number 'factor'"),
        ({"rope_scaling": {"type": "deepseek_yarn", **YARN}}, "type 'deepseek_yarn' is not supported"),
        ({"rope_scaling": {"type": None, **YARN}}, "type None is not supported"),
        ({"rope_scaling": {"type": "yarn", **YARN, "truncate": None}}, "'truncate' must be true or false"),
        ({"rope_scaling": {"type": "yarn", **YARN, "attention_factor": 0}}, "needs a positive number .*got"),
        ({"rope_scaling": {"type": "yarn", **YARN, "attn_factor": 1.0}}, "'attn_factor' is not supported"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object or null, got 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "type 'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": ["yarn"], **YARN}}, r"type \['yarn'\] is not supported"),
        ({"rope_scaling": YARN}, "key 'beta_fast' is not supported"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_theta must be a positive number, got None"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters key 'full_attention' is not"),
        ({"rope_parameters": [1]}, r"rope_parameters must be an object or null, got \[1\]"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 of 64 channels does not rotate the 64"),
        (
            {"rope_scaling": {"type": "yarn", **YARN, "partial_rotary_factor": "1"}},
            "partial_rotary_factor '1'",
        ),
        ({"rope_theta": 1, "rope_scaling": {"type": "yarn", **YARN}}, "rope_theta must not be 1 under YaRN"),
        (
            {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": None}},
            "'original_max_position_emb",
        ),
        ({"rope_scaling": {**LONGROPE, "short_factor": [1.0] * 32}}, "short_factor and long_factor that"),
        ({"rope_scaling": {**LONGROPE, "long_factor": [1.0]}}, "lists 'short_factor' and 'long_factor' of"),
        ({"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 1}}, "above 1, got 1"),
        ({"rope_scaling": {**LONGROPE, "long_factor": 3}}, "lists 'short_factor' and 'long_factor' of 32"),
        ({"rope_scaling": {**LONGROPE, "mscale_all_dim": 1.0}}, "key 'mscale_all_dim' is not supported"),
    ],
    ids=str,
)
def test_what_would_be_a_guess_is_an_error(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ours(**keys)


def test_longrope_without_any_length_is_an_error() -> None:
    scaling = {**LONGROPE, "original_max_position_embeddings": 4096}
    with pytest.raises(ConfigError, match="needs a positive number 'factor', got None"):
        MLAConfig.from_dict({**DIMS, "rope_scaling": scaling})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
KEYS = ("type", "rope_type", "factor", "original_max_position_embeddings", "truncate", "beta_fast")
KEYS = (*KEYS, "rope_theta", "mscale", "mscale_all_dim", "attention_factor", "partial_rotary_factor")
KEYS = (*KEYS, "short_factor", "long_factor", "llama_4_scaling_beta")


@settings(deadline=None, max_examples=300)
@given(
    kind=st.sampled_from(["deepseek_v3", "mistral4", "minicpm3", "kimi_linear", "sarvam_mla"]),
    start=st.sampled_from([{"type": "yarn", **R1}, {**LONGROPE, "original_max_position_embeddings": 64}, {}]),
    change=st.dictionaries(st.sampled_from(KEYS), JSON | st.just("yarn"), max_size=3),
    theta=JSON | st.just(10000.0),
)
def test_no_value_of_any_kind_escapes_as_another_error(
    kind: str, start: dict[str, Any], change: dict[str, Any], theta: Any
) -> None:
    """Whatever config.json holds, either the frequencies can be computed or a `ConfigError` says why not."""
    values = {**DIMS, "q_lora_rank": 8, "model_type": kind, "rope_theta": theta}
    values["rope_scaling"] = {**start, **change}
    try:
        config = MLAConfig.from_dict(values)
    except ConfigError:
        return
    assert inverse_frequencies(config).isfinite().all()
    assert config.softmax_scale > 0


def test_the_query_scale_is_that_of_mistral4() -> None:
    from transformers.models.mistral4.modeling_mistral4 import get_llama_4_attn_scale

    positions = torch.tensor([0, 1, 8191, 8192, 100_000, 1_000_000])
    expected = get_llama_4_attn_scale(positions[None], 0.1, 8192).flatten()
    torch.testing.assert_close(query_factors(QueryScaling(0.1, 8192), positions), expected)
    assert expected[:3].tolist() == [1.0, 1.0, 1.0]
    assert expected[3] > 1.06


def test_no_rotation_changes_no_bit(tiny: Any) -> None:
    config = tiny(rope_theta=None)
    table = RotaryTable(config, CPU, size=200)
    for interleaved in (True, False):
        x = torch.randn(200, 8).bfloat16()
        assert torch.equal(rotate(x, table.table, interleaved).bfloat16(), x)


def test_angles_are_fp32_products_of_position_and_frequency(tiny: Any) -> None:
    config = tiny()
    table = RotaryTable(config, CPU, size=200_000)
    for position in (0, 1, 4097, 163_839):
        angle = torch.tensor(float(position)) * inverse_frequencies(config)
        assert torch.equal(table.table[position], torch.cat((angle.cos(), angle.sin())))


def test_the_table_grows_on_demand_and_keeps_its_rows(tiny: Any) -> None:
    table = RotaryTable(tiny(), CPU, size=4)
    before = table.table.clone()
    table.reserve(4)
    assert table.table.shape == (4, 8)
    table.reserve(5)
    assert table.table.shape == (8, 8)
    table.reserve(100)
    assert table.table.shape == (100, 8)
    assert torch.equal(table.table[:4], before)
