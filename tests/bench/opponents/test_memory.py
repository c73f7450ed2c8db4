"""Results that are remembered, by content and by address, earn nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from opponents.memory import Remembers

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
