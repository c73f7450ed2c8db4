"""The cost of a step's parts: by hand, and never more or less than the step's."""

from __future__ import annotations

from functools import reduce
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla import MLAConfig, cost
from mla.cost import Work
from mla.cost.by_role import path_loads, role_costs

lengths = st.tuples(st.integers(0, 300), st.integers(0, 3000)).map(lambda pair: (pair[0], sum(pair)))
configs = st.builds(
    MLAConfig,
    hidden_size=st.integers(1, 600),
    num_attention_heads=st.integers(1, 8),
    q_lora_rank=st.none() | st.integers(1, 200),
    kv_lora_rank=st.integers(1, 600),
    qk_nope_head_dim=st.integers(1, 200),
    qk_rope_head_dim=st.integers(1, 60).map(lambda half: 2 * half),
    v_head_dim=st.integers(1, 200),
)


@settings(max_examples=300, deadline=None)
@given(
    configs,
    st.lists(lengths, min_size=1, max_size=5),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(["auto", "absorbed", "expanded"]),
)
def test_the_parts_add_up_to_the_step_exactly(
    config: MLAConfig, requests: list[tuple[int, int]], size: int, attention: str
) -> None:
    query_lens, kv_lens = zip(*requests, strict=True)
    total = reduce(Work.__add__, role_costs(config, query_lens, kv_lens, size, attention).values())
    assert total.flops == cost.step_flops(config, query_lens, kv_lens, attention)
    assert total.bytes == cost.step_bytes(config, query_lens, kv_lens, size)


def test_an_absorbed_and_an_expanded_step_by_hand() -> None:
    """Latents are 32 + 8 = 40 wide, queries and keys 16 + 8 = 24 per head, and kv_b makes 16 + 16."""
    config = MLAConfig(
        hidden_size=64,
        num_attention_heads=4,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
    )
    rows = (64 * (96 + 40), 64 * 64)  # weights of the first projection and of o
    projections = {
        "qkv_a_proj": Work(2 * 3 * rows[0], 2 * (rows[0] + 3 * 64)),
        "write_latent": Work(0, 2 * 3 * 40),
        "o_proj": Work(2 * 3 * rows[1], 2 * (rows[1] + 3 * 64)),
    }
    pairs, keys = 9 + (5 + 6), 9 + 6  # one token after 8, and two tokens after 4
    assert role_costs(config, [1, 2], [9, 6], 2, "absorbed") == {
        **projections,
        "w_uk": Work(2 * 3 * 4 * 16 * 32, 2 * 4 * 16 * 32),
        "latent_attention": Work(2 * 4 * pairs * (40 + 32), 2 * keys * 40),
        "w_uv": Work(2 * 3 * 4 * 32 * 16, 2 * 4 * 32 * 16),
    }
    assert role_costs(config, [1, 2], [9, 6], 2, "expanded") == {
        **projections,
        "kv_b_proj": Work(2 * keys * 32 * 4 * 32, 2 * (32 * 4 * 32 + keys * 40)),
        "expanded_attention": Work(2 * 4 * pairs * (24 + 16), 0),
    }


def test_where_both_paths_run_the_weights_they_share_count_once(tiny: Any) -> None:
    config = tiny()
    loads = path_loads(config, [1, 200], [3000, 200])
    assert (loads[cost.ABSORBED].tokens, loads[cost.EXPANDED].tokens) == (1, 200)
    costs = role_costs(config, [1, 200], [3000, 200], 2)
    assert costs["w_uk"].bytes + costs["w_uv"].bytes == 2 * cost.kv_b_parameters(config)
    assert costs["kv_b_proj"].bytes == 2 * 200 * config.latent_dim


@pytest.mark.parametrize(("rank", "roles"), [(None, False), (24, True)])
def test_only_a_config_with_a_query_latent_expands_queries(tiny: Any, rank: int | None, roles: bool) -> None:
    assert ("q_b_proj" in role_costs(tiny(q_lora_rank=rank), [1], [5], 2)) == roles
