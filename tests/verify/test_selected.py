"""Rows of a layer that selects, in float64: against the oracle that expands all keys, and the layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from mla import MLA, LatentCache, MLAConfig
from mla.verify.layer_oracle import TrueLayer, oracle
from mla.weights import random_state_dict

History = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
HISTORY, NEW = (30, 0, 7), (4, 9, 1)


@pytest.fixture(params=["deepseek_v32", "glm_moe_dsa"])
def config(request: pytest.FixtureRequest) -> MLAConfig:
    """A tiny layer; the two families rotate index keys in two layouts."""
    sizes = {"hidden_size": 64, "num_attention_heads": 3, "q_lora_rank": 48, "kv_lora_rank": 32,
             "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "index_n_heads": 5,
             "index_head_dim": 16, "index_topk": 6}  # fmt: skip
    return MLAConfig.from_dict({"model_type": request.param, **sizes})


def drawn(config: MLAConfig) -> tuple[dict[str, torch.Tensor], torch.Tensor, list[History]]:
    """Return weights, hidden states [T, d], and per request kv, pe and index keys of the history."""
    draw = torch.Generator().manual_seed(1)
    widths = config.kv_lora_rank, config.qk_rope_head_dim, config.index_head_dim
    history = [[torch.randn(s, width, generator=draw) for width in widths] for s in HISTORY]
    hidden = torch.randn(sum(NEW), config.hidden_size, generator=draw)
    return random_state_dict(config, dtype=torch.float32), hidden, [(kv, pe, k) for kv, pe, k in history]


def cached_in(past: Sequence[torch.Tensor], new: Sequence[torch.Tensor]) -> Callable[..., Any]:
    whole = [torch.cat(parts) for parts in zip(past, new, strict=True)]
    return lambda positions: [part[positions].double() for part in whole]


def test_rows_given_a_selection_are_those_of_the_oracle(config: MLAConfig) -> None:
    state, hidden, history = drawn(config)
    selection, start = torch.full((sum(NEW), 6), -1), 0
    draw = torch.Generator().manual_seed(2)
    for past, new in zip(HISTORY, NEW, strict=True):
        for row in range(new):
            some = torch.randperm(past + row + 1, generator=draw)[:6]
            selection[start + row, : len(some)] = some
        start += new
    expected = oracle(config, state, hidden, NEW, [(kv, pe) for kv, pe, _ in history], selection=selection)
    truth, start = TrueLayer(config, state), 0
    for (kv, pe, _), new in zip(history, NEW, strict=True):
        rows = slice(start, start := start + new)
        positions = torch.arange(len(kv), len(kv) + new)
        cached = cached_in((kv, pe), truth.latents(hidden[rows], positions))
        attended = truth.attended(hidden[rows], positions, cached, selection[rows])
        torch.testing.assert_close(attended, expected[rows], rtol=1e-10, atol=1e-12)


def test_without_a_selection_all_that_is_seen_is_attended(config: MLAConfig) -> None:
    state, hidden, history = drawn(config)
    expected = oracle(config, state, hidden[:4], [4], [(history[0][0], history[0][1])])
    truth, positions = TrueLayer(config, state), torch.arange(30, 34)
    kv, pe = truth.latents(hidden[:4], positions)
    cached = cached_in(history[0][:2], (kv, pe))
    attended = truth.attended(hidden[:4], positions, cached)
    torch.testing.assert_close(attended, expected, rtol=1e-10, atol=1e-12)


def test_the_indexer_has_what_a_layer_in_float32_gives_its_ops(config: MLAConfig) -> None:
    state, hidden, history = drawn(config)
    layer = MLA(config, dtype=torch.float32, ops="reference")
    layer.load_state_dict(state)
    cache = LatentCache(config, max_tokens=256, page_size=16, dtype=torch.float32)
    sequences = cache.new_sequences(3)
    for sequence, (kv, pe, index) in zip(sequences, history, strict=True):
        cache.load(sequence, kv, pe, index=index)
    layer(hidden, cache.extend(sequences, NEW), *cache.of_layer(0))
    views, truth, start = layer.step.views.indexed(sum(NEW)), TrueLayer(config, state), 0
    for sequence, past, new in zip(sequences, HISTORY, NEW, strict=True):
        rows, positions = slice(start, start := start + new), torch.arange(past, past + new)
        q, weights = truth.index_queries(hidden[rows], positions)
        torch.testing.assert_close(views.q[rows].double(), q, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(views.weights[rows].double(), weights, rtol=1e-5, atol=1e-6)
        keys = cache.read_index(sequence)
        assert keys is not None
        torch.testing.assert_close(
            keys[past:].double(), truth.index_keys(hidden[rows], positions), rtol=1e-5, atol=1e-5
        )
