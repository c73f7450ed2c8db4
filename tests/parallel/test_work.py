"""A rank's work, counted by hand, and against what one device does: what all share is there once per rank."""

from __future__ import annotations

import random

import pytest

from mla.config import MLAConfig
from mla.cost import Work, step_work
from mla.parallel.layout import Layout, rank_work

# Weights: q_a 48, q_b 96, kv_a 56, kv_b 100, o 96; a token of the cache is 7 numbers.
CONFIG = MLAConfig(8, 4, q_lora_rank=6, kv_lora_rank=5, qk_nope_head_dim=2, qk_rope_head_dim=2, v_head_dim=3)
# A decode step at 6 tokens, and two new tokens at 3: the new token 6, and 3 and 4.
NEW, LENGTHS = (1, 2), (7, 5)


def work(text: str, rank: int, new: tuple[int, ...] = NEW, lengths: tuple[int, ...] = LENGTHS) -> Work:
    return rank_work(CONFIG, Layout.parse(text), rank, new, lengths, 2, "absorbed")


def test_tp_has_half_of_the_heads_and_all_that_heads_share() -> None:
    weights = 48 + 56 + 48 + 50 + 48
    assert work("tp=2", 0) == work("tp=2", 1)
    assert work("tp=2", 1) == Work(
        2 * 3 * weights + 2 * 2 * (7 + 4 + 5) * (5 + 2 + 5),
        2 * (weights + (7 + 5 + 3) * 7 + 2 * 3 * 8),
    )


def test_dcp_attends_its_tokens_for_the_heads_of_all() -> None:
    weights = 48 + 56 + 48 + 50 + 48
    # Tokens 0 2 4 6 and 0 2 4 on rank 0: of the new tokens 6 and 4, and token 3 sees two of them.
    assert work("dcp=2", 0) == Work(
        2 * 3 * weights + 2 * 4 * (4 + 2 + 3) * 12, 2 * (weights + (4 + 3 + 2) * 7 + 2 * 3 * 8)
    )
    assert work("dcp=2", 1) == Work(
        2 * 3 * weights + 2 * 4 * (3 + 2 + 2) * 12, 2 * (weights + (3 + 2 + 1) * 7 + 2 * 3 * 8)
    )


def test_dp_has_all_weights_for_its_own_requests() -> None:
    whole = 48 + 96 + 56 + 100 + 96
    assert work("dp=2", 0, (1,), (7,)) == Work(2 * whole + 2 * 4 * 7 * 12, 2 * (whole + (7 + 1) * 7 + 2 * 8))
    assert work("dp=2", 1, (2,), (5,)) == Work(
        2 * 2 * whole + 2 * 4 * 9 * 12, 2 * (whole + (5 + 2) * 7 + 2 * 2 * 8)
    )


def shared(tokens: int) -> Work:
    """Return what every rank does of what heads share: their projections, and hidden states in and out."""
    weights = 48 + 56
    return Work(2 * tokens * weights, 2 * (weights + 2 * tokens * 8))


@pytest.mark.parametrize("text", ["tp=4", "dcp=2", "dcp=4", "tp=2,dcp=2"])
def test_all_ranks_do_what_one_device_does_and_repeat_what_is_shared(text: str) -> None:
    layout, draw = Layout.parse(text), random.Random(text)
    for _ in range(20):
        new = tuple(draw.randint(1, 9) for _ in range(3))
        lengths = tuple(count + draw.choice([0, draw.randint(0, 30)]) for count in new)
        ranks = [work(text, rank, new, lengths) for rank in range(layout.world)]
        cache = 2 * (sum(lengths) + sum(new)) * 7  # on every part of tp
        again = [Work(0, 0), Work(0, (layout.tp - 1) * cache)]
        again += [shared(sum(new))] * (layout.world - 1)
        whole = step_work(CONFIG, new, lengths, 2, "absorbed")
        assert sum(ranks, Work()) == sum(again, whole)


def test_a_path_is_chosen_as_on_one_device() -> None:
    prompt, layout = ((512,), (512,)), Layout.parse("tp=2")
    config = MLAConfig.preset("deepseek-r1")
    flops = {kind: rank_work(config, layout, 0, *prompt, 2, kind).flops for kind in ("auto", "absorbed")}
    assert flops["auto"] == rank_work(config, layout, 0, *prompt, 2, "expanded").flops < flops["absorbed"]
