"""FLOPs, bytes and the choice between the two attention paths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla import MLAConfig, cost
from mla.layer.ops import layer_roles
from mla.weights import weight_shapes

dims = st.integers(1, 600)
lengths = st.tuples(st.integers(0, 500), st.integers(0, 5000)).map(lambda pair: (pair[0], sum(pair)))


def config_of(c: int, n: int, r: int, v: int, heads: int = 2) -> MLAConfig:
    return MLAConfig(
        hidden_size=8,
        num_attention_heads=heads,
        kv_lora_rank=c,
        qk_nope_head_dim=n,
        qk_rope_head_dim=2 * r,
        v_head_dim=v,
    )


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 40), st.integers(0, 60))
def test_attended_pairs_equal_a_count(query_len: int, history: int) -> None:
    kv_len = history + query_len
    count = sum(1 for i in range(query_len) for key in range(kv_len) if key <= history + i)
    assert cost.attended_pairs(query_len, kv_len) == count


@settings(max_examples=300, deadline=None)
@given(dims, dims, dims, dims, lengths)
def test_the_chosen_path_has_the_fewer_flops(
    c: int, n: int, r: int, v: int, request_lengths: tuple[int, int]
) -> None:
    config = config_of(c, n, r, v)
    absorbed = cost.absorbed_flops(config, *request_lengths)
    expanded = cost.expanded_flops(config, *request_lengths)
    expected = cost.ABSORBED if absorbed <= expanded else cost.EXPANDED
    assert cost.PathChooser(config).path(*request_lengths) == expected


@pytest.mark.parametrize(("new", "old", "pairs"), [(1, 0, 1), (1, 9, 10), (3, 2, 12)])
def test_flops_of_a_small_step_by_hand(new: int, old: int, pairs: int) -> None:
    config = config_of(c=10, n=3, r=2, v=5)
    assert cost.absorbed_flops(config, new, new + old) == 4 * (pairs * (10 + 4 + 10) + new * 10 * (3 + 5))
    assert cost.expanded_flops(config, new, new + old) == 4 * (
        pairs * (3 + 4 + 5) + (new + old) * 10 * (3 + 5)
    )


@pytest.mark.parametrize("preset", ["deepseek-r1", "deepseek-v2-lite", "kimi-k2"])
def test_break_even_of_a_long_history_is_about_170_new_tokens(preset: str) -> None:
    chooser, history = cost.PathChooser(MLAConfig.preset(preset)), 100_000
    paths = [chooser.path(new, history + new) for new in range(1, 400)]
    first_expanded = paths.index(cost.EXPANDED) + 1
    assert 165 <= first_expanded <= 175
    assert set(paths[first_expanded:]) == {cost.EXPANDED}


def test_decode_over_history_is_absorbed_and_prefill_without_history_expanded() -> None:
    chooser = cost.PathChooser(MLAConfig.preset("deepseek-r1"))
    assert chooser.path(1, 1000) == cost.ABSORBED
    assert chooser.path(1000, 1000) == cost.EXPANDED


@settings(max_examples=60, deadline=None)
@given(st.lists(lengths, min_size=1, max_size=5))
def test_a_step_costs_its_projections_and_the_cheaper_path_of_each_request(
    requests: list[tuple[int, int]],
) -> None:
    config = MLAConfig.preset("deepseek-v2-lite")
    query_lens, kv_lens = zip(*requests, strict=True)
    steps = {
        mode: cost.step_flops(config, query_lens, kv_lens, mode) for mode in ("absorbed", "expanded", "auto")
    }
    assert steps["auto"] <= min(steps["absorbed"], steps["expanded"])
    projections = 2 * cost.projection_parameters(config) * sum(query_lens)
    cheaper = sum(
        min(cost.absorbed_flops(config, *one), cost.expanded_flops(config, *one)) for one in requests
    )
    assert steps["auto"] == projections + cheaper


@pytest.mark.parametrize("rank", [None, 24])
def test_parameters_count_every_matrix(tiny: Any, rank: int | None) -> None:
    config = tiny(q_lora_rank=rank)
    matrices = [shape for shape in weight_shapes(config).values() if len(shape) == 2]
    assert cost.parameters(config) == sum(rows * columns for rows, columns in matrices)


def test_bytes_grow_with_the_attended_latents_and_the_element_size(tiny: Any) -> None:
    config = tiny()
    short, long = (cost.step_bytes(config, [1, 1], lens, 2) for lens in ([10, 10], [10, 110]))
    assert long - short == 2 * 100 * config.latent_dim
    assert cost.step_bytes(config, [1, 1], [10, 10], 4) == 2 * short


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64), st.integers(1, 40))
def test_decode_is_planned_at_once_only_where_every_request_would_absorb(
    latent: int, nope: int, value: int, least: int
) -> None:
    config = MLAConfig(
        hidden_size=8, num_attention_heads=2, kv_lora_rank=latent, qk_nope_head_dim=nope, v_head_dim=value
    )
    chooser = cost.PathChooser(config)
    paths = {chooser.path(1, kv_len) for kv_len in range(least, least + 200)}
    if chooser.always_absorbs(least):
        assert paths == {cost.ABSORBED}
    else:
        assert chooser.path(1, 10**9) == cost.EXPANDED or cost.EXPANDED in paths


def test_a_single_cached_key_is_not_absorbed() -> None:
    chooser = cost.PathChooser(MLAConfig.preset("deepseek-v2-lite"))
    assert not chooser.always_absorbs(1)
    assert chooser.always_absorbs(2)


def spec_of(kind: str) -> Any:
    """Return a role's spec in bf16 for a config with a query LoRA."""
    config = MLAConfig(
        hidden_size=8,
        num_attention_heads=3,
        q_lora_rank=6,
        kv_lora_rank=10,
        qk_nope_head_dim=4,
        qk_rope_head_dim=2,
        v_head_dim=5,
    )
    return layer_roles(config, torch.bfloat16, torch.device("cpu"))[kind][1]


def test_work_of_projections_by_hand() -> None:
    assert cost.linear_cost(spec_of("q_b_proj"), 7) == (2 * 7 * 6 * 18, 2 * (6 * 18 + 7 * (6 + 18)))
    assert cost.linear_cost(spec_of("w_uv"), 7) == (2 * 7 * 3 * 10 * 5, 2 * 3 * (10 * 5 + 7 * (10 + 5)))


def test_work_of_small_ops_by_hand() -> None:
    assert cost.rms_norm_cost(spec_of("q_a_layernorm"), 7) == (4 * 7 * 6, 2 * (7 * 6 + 7 * 6 + 6))
    angles = 7 * 2 * 4
    assert cost.rotate_query_cost(spec_of("rotate_query"), 7) == (7 * 3 * 6, 2 * 2 * 7 * 3 * 2 + angles)
    written = 2 * (7 * 12 + 7 * 12 + 10) + angles + 7 * 8
    assert cost.write_latent_cost(spec_of("write_latent"), 7) == (7 * (4 * 10 + 6), written)


def test_work_of_attention_by_hand() -> None:
    """Requests of 1 and 3 new tokens over 9 and 5 keys: 9 and 3 + 4 + 5 pairs."""
    lengths, pairs = ((1, 3), (9, 5)), 9 + 12
    latent = cost.latent_attention_cost(spec_of("latent_attention"), *lengths)
    assert latent == (2 * 3 * pairs * (12 + 10), 2 * (4 * 3 * 12 + 14 * 12 + 4 * 3 * 10) + 4 * 4 * 3)
    expanded = cost.expanded_attention_cost(spec_of("expanded_attention"), *lengths)
    assert expanded == (2 * 3 * pairs * (6 + 5), 2 * 3 * (4 * 6 + 14 * 6 + 14 * 5 + 4 * 5) + 4 * 4 * 3)
