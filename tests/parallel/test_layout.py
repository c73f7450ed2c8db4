"""How ranks are laid out and what cannot be; a rank's work, and the model of a link, by hand and by fit."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from mla import MLAConfig
from mla.cost import Work, step_work
from mla.errors import UsageError
from mla.parallel.groups import Groups
from mla.parallel.layout import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    KINDS,
    Call,
    Layout,
    Line,
    Link,
    Place,
    fit,
    rank_work,
)


def test_ranks_of_a_context_are_neighbours() -> None:
    layout = Layout.parse("dp=2, tp=2,dcp=2")
    assert (layout.world, str(layout)) == (8, "dp=2,tp=2,dcp=2")
    places = [layout.place(rank) for rank in range(8)]
    assert places[:4] == [Place(0, 0, 0), Place(0, 0, 1), Place(0, 1, 0), Place(0, 1, 1)]
    assert places[4:] == [replace(place, dp=1) for place in places[:4]]
    assert layout.groups(layout.head_parts) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert layout.groups(layout.dcp) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [layout.head_part(rank) for rank in range(8)] == [0, 1, 2, 3] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tp2", "a layout has tp, dcp and dp at most once, as 'tp=2,dcp=2', got 'tp2'"),
        ("", "a layout has tp, dcp and dp at most once"),
        ("tp=-1", "a layout has tp, dcp and dp at most once"),
        ("tp=0", "tp must be between 1 and 4096, got 0"),
        ("dp=5000", "dp must be between 1 and 4096, got 5000"),
        ("pp=2", "a layout has tp, dcp and dp at most once"),
        ("tp=2,tp=4", "a layout has tp, dcp and dp at most once"),
    ],
)
def test_a_wrong_layout_is_one_sentence(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Layout.parse(text)


def test_heads_that_cannot_be_split_are_named() -> None:
    config = MLAConfig.preset("deepseek-v2-lite")
    Layout(tp=4, dcp=4).check(config)
    with pytest.raises(UsageError, match=r"'tp=3' splits heads over 3 ranks, and config '.*' has 16"):
        Layout(tp=3).check(config)


def test_without_processes_there_are_no_groups() -> None:
    with pytest.raises(UsageError, match="start this with torchrun or srun"):
        Groups(Layout(tp=2))


# ---------------------------------------------------------------------------------------------- work
# What all ranks share is there once per rank.
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


# ---------------------------------------------------------------------------------------------- link
@pytest.mark.parametrize(
    ("text", "alpha", "beta"),
    [
        ("alpha=5us,beta=300GB/s", 5e-6, 300e9),
        (" alpha=1.5ms , beta=2GiB/s", 1.5e-3, 2 * 2**30),
        ("alpha=0us,beta=infGB/s", 0.0, math.inf),
        ("ALPHA=20NS,BETA=1TB/S", 20e-9, 1e12),
    ],
)
def test_a_link_is_read_with_its_units(text: str, alpha: float, beta: float) -> None:
    link = Link.parse(text)
    assert [link.lines[kind] for kind in KINDS] == [Line(pytest.approx(alpha), pytest.approx(beta))] * 3


@pytest.mark.parametrize(
    "text",
    [
        *(
            "alpha=5us",
            "beta=3GB/s,alpha=5us",
            "alpha=5,beta=3GB/s",
            "alpha=5us,beta=3GB",
            "alpha=-5us,beta=3GB/s",
        ),
        *("alpha=5us,beta=0GB/s", "alpha=infus,beta=3GB/s", "alpha=1.2.3us,beta=3GB/s", "", "5us"),
    ],
)
def test_anything_else_is_one_sentence(text: str) -> None:
    with pytest.raises(UsageError, match="a link is written as in 'alpha=5us,beta=300GB/s'"):
        Link.parse(text)


def test_kinds_may_differ_and_text_repeats_what_was_read() -> None:
    text = "all-reduce:alpha=5us,beta=3GB/s;all-gather:alpha=0us,beta=infGB/s"
    link = Link.parse(text)
    assert link.missing(KINDS) == ["all-to-all"]
    assert Link.parse(str(link)) == link
    assert str(Link.parse("alpha=5us,beta=3GB/s")) == "alpha=5us,beta=3GB/s"
    assert Link.parse("ideal") == Link.parse(str(Link({}))) == Link({})
    assert Link({}).missing(KINDS) == []
    with pytest.raises(UsageError, match=r"unknown collective 'all-reduc'\. Did you mean 'all-reduce'"):
        Link.parse("all-reduc:alpha=5us,beta=3GB/s")


def test_collectives_cost_what_their_algorithms_send() -> None:
    """Of 4 ranks: a ring's all-reduce is its reduce-scatter and its all-gather, 3 messages each."""
    calls = [Call(ALL_REDUCE, 4, 1000), Call(ALL_GATHER, 4, 250), Call(ALL_TO_ALL, 4, 1000)]
    assert [(call.steps, call.sent) for call in calls] == [(6, 1500), (3, 750), (3, 750)]
    link = Link(dict.fromkeys(KINDS, Line(alpha=1.0, beta=10.0)))
    assert link.seconds(calls) == pytest.approx(6 + 150 + 3 + 75 + 3 + 75)
    assert Link({}).seconds(calls) == 0.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_fit_finds_the_line_it_was_measured_on(kind: str, ranks: int) -> None:
    true = Line(7e-6, 2.5e9)
    small, large = Call(kind, ranks, 32 << 10), Call(kind, ranks, 8 << 20)
    fitted = fit((small, true.seconds(small)), (large, true.seconds(large)))
    assert (fitted.alpha, fitted.beta) == (pytest.approx(true.alpha), pytest.approx(true.beta))


def test_noise_makes_no_negative_costs() -> None:
    small, large = Call(ALL_REDUCE, 2, 100), Call(ALL_REDUCE, 2, 10_000)
    assert fit((small, 2.0), (large, 1.0)) == Line(1.0, math.inf)
    steep = fit((small, 1e-9), (large, 1.0))
    assert steep.alpha == 0.0
    assert steep.beta > 0
    assert Link({ALL_GATHER: steep}).missing(KINDS) == ["all-reduce", "all-to-all"]
