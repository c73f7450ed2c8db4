"""The comparison of layers that select: what it counts, and that `transformers` is given what ours is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.peers import sparse_layers
from benchmarks.peers.sparse_layers import TOLERATED, Stock, attention_flops, measure
from mla import MLAConfig

V32 = MLAConfig.named("deepseek-v3.2")
SMALL = replace(
    V32, hidden_size=256, num_attention_heads=4, q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=32,
    qk_rope_head_dim=32, v_head_dim=32, index_n_heads=4, index_head_dim=64, index_topk=24,
)  # fmt: skip


def test_flops_are_those_of_the_published_dimensions() -> None:
    """128 heads of 576 and 512 numbers, 64 of 128, 2048 latents: 9.13 and 1.11 GFLOP at 32k."""
    dense, sparse = attention_flops(V32, 32768)
    assert dense == 32768 * 2 * 128 * (576 + 512)
    assert sparse == 32768 * 2 * 64 * 128 + 2048 * 2 * 128 * (576 + 512)


def test_transformers_computes_the_same_beyond_topk(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers.models.deepseek_v32")
    right = measure(SMALL, history=90, requests=3, few=2, rounds=1)
    assert right.difference is not None
    assert right.difference < TOLERATED
    assert right.gain == right.ms["dense"] / right.ms["sparse"]
    before = Stock.before

    def other_keys(self: Stock) -> None:
        self._index = -self._index
        before(self)

    monkeypatch.setattr(sparse_layers.Stock, "before", other_keys)
    with torch.no_grad():
        wrong = measure(SMALL, history=90, requests=3, few=2, rounds=1).difference
    assert wrong is not None
    assert wrong > TOLERATED
