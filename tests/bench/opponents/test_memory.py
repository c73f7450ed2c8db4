"""Results of earlier calls earn nothing: remembered by content and by address, or left where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from opponents.memory import LOOKS, ComputedOnce, Remembers, SkipsFilled

Play = Callable[..., Any]


@pytest.mark.parametrize(
    ("key", "scenario"),
    [
        ("six numbers", "prefill"),
        ("six numbers", "decode"),
        ("two numbers", "decode"),
        ("forty numbers", "prefill"),
        ("the whole operand", "prefill"),
        ("the whole operand", "decode"),
        ("the first row", "prefill"),
        ("every other row", "decode"),
        ("all but the last row", "prefill"),
        ("amounts without signs", "prefill"),
        ("amounts without signs", "decode"),
        ("the sum", "decode"),
        ("addresses of x and out", "prefill"),
        ("the address of out", "decode"),
        ("the number of the step", "prefill"),
        ("the number of the step", "decode"),
    ],
)
def test_what_another_pass_computed_does_not_pass_for_this_one(play: Play, key: str, scenario: str) -> None:
    """Either results are served that are wrong here, or what is looked for never comes again."""
    opponent = Remembers(key)
    duel = play(opponent, scenario)
    assert duel.lost or opponent.hardly_eased, str(duel)


@pytest.mark.parametrize(
    "key", ["six numbers", "the whole operand", "amounts without signs", "the address of x", "nothing"]
)
def test_what_another_forward_of_the_pass_computed_does_not_pass_for_this_one(play: Play, key: str) -> None:
    opponent = Remembers(key, within_a_pass=True)
    duel = play(opponent, "prefill")
    assert duel.lost or opponent.hardly_eased, str(duel)


@pytest.mark.parametrize(
    ("key", "op"),
    [
        ("six numbers", "latent_attention"),
        ("the whole operand", "latent_attention"),
        ("the address of x", "latent_attention"),
        ("nothing", "o_proj"),
        ("the whole operand", "o_proj"),
        ("the address of x", "expanded_attention"),
    ],
)
def test_an_op_alone_cannot_remember_either(play: Play, key: str, op: str) -> None:
    opponent = Remembers(key, kinds=("linear" if op == "o_proj" else op,))
    kv = ("--kv", "100") if op.endswith("attention") else ()
    duel = play(opponent, f"op {op}", *("--batch", "8", "--runs", "8", "--passes", "6"), *kv)
    assert duel.lost or opponent.hardly_eased, str(duel)


@pytest.mark.parametrize(
    ("what", "look"),
    [*(("forward", look) for look in LOOKS), ("o_proj", "its last number"), ("o_proj", "anything but zero")],
)
def test_an_output_that_is_filled_is_not_left_alone(play: Play, what: str, look: str) -> None:
    """Outputs hold NaN before every forward: none is found filled, or what was left alone is wrong."""
    opponent = SkipsFilled(what, look)
    duel = play(opponent, "prefill")
    assert duel.lost or opponent.hardly_eased, str(duel)


@pytest.mark.parametrize(("what", "scenario"), [("scratch", "prefill"), ("all", "decode")])
def test_scratch_of_an_earlier_forward_is_no_result_of_this_one(play: Play, what: str, scenario: str) -> None:
    opponent = SkipsFilled(what)
    duel = play(opponent, scenario)
    assert opponent.gains
    assert duel.lost, str(duel)


@pytest.mark.parametrize(
    ("op", "skips"),
    [
        ("latent_attention", "filled"),
        ("latent_attention", "after 1"),
        ("latent_attention", "after 2"),
        ("latent_attention", "every 5"),
        ("o_proj", "filled"),
        ("o_proj", "every 2"),
        ("expanded_attention", "after 1"),
        ("expanded_attention", "every 5"),
        ("w_uk", "filled"),
        ("rotate_query", "after 2"),
        ("rotate_query", "every 2"),
    ],
)
def test_a_call_that_is_not_computed(play: Play, op: str, skips: str) -> None:
    kind = {"o_proj": "linear", "w_uk": "batched_linear"}.get(op, op)
    opponent = ComputedOnce(kind, skips)
    kv = ("--kv", "60") if op.endswith("attention") else ()
    duel = play(opponent, f"op {op}", "--batch", "8", "--runs", "10", "--passes", "6", *kv)
    assert duel.lost or opponent.hardly_eased, str(duel)
    assert opponent.gains or skips in ("filled", "after 1", "after 2")
