"""FLOPs, bytes and the choice between the two attention paths: by hand, and of any lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla import MLAConfig, cost
from mla.cost import Work
from mla.layer.ops import layer_roles
from mla.weights import weight_shapes

dims = st.integers(1, 600)
PATHS = (cost.ABSORBED, cost.EXPANDED)
lengths = st.tuples(st.integers(0, 500), st.integers(0, 5000)).map(lambda pair: (pair[0], sum(pair)))


def config_of(c: int, n: int, r: int, v: int, heads: int = 2) -> MLAConfig:
    return MLAConfig(8, heads, kv_lora_rank=c, qk_nope_head_dim=n, qk_rope_head_dim=2 * r, v_head_dim=v)


def attention_flops(config: MLAConfig, query_len: int, kv_len: int, path: str) -> int:
    """Return the FLOPs of a request's attention on one path, without the projections of its new tokens."""
    step = cost.step_work(config, [query_len], [kv_len], 2, path)
    return step.flops - 2 * cost.parameters(config, cost.PROJECTIONS) * query_len


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
    absorbed, expanded = (attention_flops(config, *request_lengths, path) for path in PATHS)
    expected = cost.ABSORBED if absorbed <= expanded else cost.EXPANDED
    query_len, kv_len = request_lengths
    assert cost.by_path(config, [query_len], [kv_len])[expected] == [0]


@settings(max_examples=60, deadline=None)
@given(st.lists(lengths, min_size=1, max_size=5))
def test_a_step_costs_its_projections_and_the_cheaper_path_of_each_request(
    requests: list[tuple[int, int]],
) -> None:
    config = MLAConfig.preset("deepseek-v2-lite")
    query_lens, kv_lens = zip(*requests, strict=True)
    projections = 2 * cost.parameters(config, cost.PROJECTIONS) * sum(query_lens)
    cheaper = sum(min(attention_flops(config, *request, path) for path in PATHS) for request in requests)
    assert cost.step_work(config, query_lens, kv_lens, 2).flops == projections + cheaper


@pytest.mark.parametrize("gate", [None, "head", "element"])
@pytest.mark.parametrize("rank", [None, 24])
def test_parameters_count_every_matrix(tiny: Any, rank: int | None, gate: str | None) -> None:
    for config in (tiny(q_lora_rank=rank, output_gate=gate), MLAConfig.preset("deepseek-v3.2")):
        matrices = [shape for shape in weight_shapes(config).values() if len(shape) == 2]
        assert cost.parameters(config) == sum(rows * columns for rows, columns in matrices)


def test_a_gate_costs_its_projection(tiny: Any) -> None:
    """7 tokens times h x v gates of d inputs, whose weights move once; hidden states move for all at once."""
    config = tiny(output_gate="element")
    weights = config.num_attention_heads * config.v_head_dim * config.hidden_size
    step = [*((3, 4), (9, 4)), 2]
    assert cost.role_costs(config, *step)["g_proj"] == Work(2 * 7 * weights, 2 * weights)
    extra = cost.step_work(config, *step), cost.step_work(tiny(), *step)
    assert extra[0].flops - extra[1].flops == 2 * 7 * weights


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64), st.integers(1, 40))
def test_every_request_of_a_decode_takes_the_path_with_the_fewer_flops(
    latent: int, nope: int, value: int, least: int
) -> None:
    config, kv_lens = config_of(latent, nope, 64, value), range(least, least + 200)
    flops = [[attention_flops(config, 1, kv_len, path) for path in PATHS] for kv_len in kv_lens]
    absorbed = [i for i, (latents, rebuilt) in enumerate(flops) if latents <= rebuilt]
    assert cost.by_path(config, [1] * 200, kv_lens)[cost.ABSORBED] == absorbed


def spec_of(kind: str) -> Any:
    """Return a role's spec in bf16 for a config with a query LoRA."""
    config = MLAConfig(
        8, 3, q_lora_rank=6, kv_lora_rank=10, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=5
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


@settings(max_examples=100, deadline=None)
@given(
    st.lists(lengths, min_size=1, max_size=5),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(["auto", "absorbed", "expanded"]),
    st.sampled_from(["deepseek-r1", "deepseek-v2-lite"]),
)
def test_every_weight_and_latent_moves_once_whichever_path_is_taken(
    requests: list[tuple[int, int]], size: int, attention: str, preset: str
) -> None:
    config = MLAConfig.preset(preset)
    query_lens, kv_lens = zip(*requests, strict=True)
    latents = (sum(kv_lens) + sum(query_lens)) * config.latent_dim
    hidden = 2 * sum(query_lens) * config.hidden_size
    moved = cost.step_work(config, query_lens, kv_lens, size, attention).bytes
    assert moved == size * (cost.parameters(config) + latents + hidden)


def test_an_absorbed_and_an_expanded_step_by_hand() -> None:
    """Latents are 32 + 8 = 40 wide, queries and keys 16 + 8 = 24 per head, and kv_b makes 16 + 16."""
    config = MLAConfig(64, 4, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
    rows = (64 * (96 + 40), 64 * 64)  # weights of the first projection and of o
    projections = {
        "qkv_a_proj": Work(2 * 3 * rows[0], 2 * (rows[0] + 3 * 64)),
        "write_latent": Work(0, 2 * 3 * 40),
        "o_proj": Work(2 * 3 * rows[1], 2 * (rows[1] + 3 * 64)),
    }
    pairs, keys = 9 + (5 + 6), 9 + 6  # one token after 8, and two tokens after 4
    assert cost.role_costs(config, [1, 2], [9, 6], 2, "absorbed") == {
        **projections,
        "w_uk": Work(2 * 3 * 4 * 16 * 32, 2 * 4 * 16 * 32),
        "latent_attention": Work(2 * 4 * pairs * (40 + 32), 2 * keys * 40),
        "w_uv": Work(2 * 3 * 4 * 32 * 16, 2 * 4 * 32 * 16),
    }
    assert cost.role_costs(config, [1, 2], [9, 6], 2, "expanded") == {
        **projections,
        "kv_b_proj": Work(2 * keys * 32 * 4 * 32, 2 * (32 * 4 * 32 + keys * 40)),
        "expanded_attention": Work(2 * 4 * pairs * (24 + 16), 0),
    }


def test_where_both_paths_run_the_weights_they_share_count_once(tiny: Any) -> None:
    config = tiny()
    costs = cost.role_costs(config, [1, 200], [3000, 200], 2)
    assert costs["w_uk"].bytes + costs["w_uv"].bytes == 2 * cost.parameters(config, cost.KV_B)
    assert costs["w_uk"].flops == 2 * cost.parameters(config, cost.KV_B) - costs["w_uv"].flops
    assert costs["kv_b_proj"].bytes == 2 * 200 * config.latent_dim


# --------------------------------------------------------------------------------------------- an indexer
V32 = MLAConfig.preset("deepseek-v3.2")


@pytest.mark.parametrize(
    ("keys", "scores", "attended", "megabytes"),
    [
        (4096, 0.067, 0.570, 3.4),
        (8192, 0.134, 0.570, 4.5),
        (32768, 0.537, 0.570, 10.7),
        (131072, 2.147, 0.570, 35.9),
    ],
)
def test_a_token_of_deepseek_v32_by_hand(keys: int, scores: float, attended: float, megabytes: float) -> None:
    """FLOPs per query and key are 2 * 64 * 128 of the indexer and 2 * 128 * (576 + 512) of attention."""
    roles = cost.role_costs(V32, [1], [keys], 2)
    assert roles["select_latents"].flops / 1e9 == pytest.approx(scores, abs=5e-4)
    assert roles["sparse_latent_attention"].flops / 1e9 == pytest.approx(attended, abs=5e-4)
    read = roles["select_latents"].bytes + roles["sparse_latent_attention"].bytes
    assert read / 1e6 == pytest.approx(megabytes, abs=0.06)
    assert "latent_attention" not in roles
    indexer = sum(roles[f"index_{part}_proj"].flops for part in ("q", "k", "weights"))
    assert indexer == 2 * cost.parameters(V32, cost.INDEXER)
    assert indexer / 1e9 == pytest.approx(0.028, abs=5e-4)
    assert roles["index_weights_proj"].bytes == 4 * 7168 * 64, "which is kept in float32"


def test_a_batch_within_topk_costs_what_a_dense_one_does_and_its_index_keys() -> None:
    lengths = [1, 300], [2048, 300]
    dense = cost.role_costs(MLAConfig.preset("deepseek-v3"), *lengths, 2)
    sparse = cost.role_costs(V32, *lengths, 2)
    assert sparse == {**dense, **{role: sparse[role] for role in ("index_k_proj", "write_index_key")}}
    assert sparse["write_index_key"] == Work(0, 301 * 256)
    beyond = cost.role_costs(V32, [1, 300], [2049, 300], 2)
    assert "expanded_attention" not in beyond, "one context beyond makes the batch sparse"
    assert beyond["sparse_latent_attention"].bytes == (2048 + 300) * 1152
    pairs = 2048 + 300 * 301 // 2
    assert beyond["sparse_latent_attention"].flops == 2 * 128 * pairs * 1088
