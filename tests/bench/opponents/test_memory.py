"""Results that are remembered, by content and by address, earn nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from opponents.memory import Remembers

Play = Callable[..., Any]


@pytest.mark.parametrize("scenario", ["prefill", "decode"])
@pytest.mark.parametrize(
    "key",
    [
        "six numbers",
        "two numbers",
        "forty numbers",
        "the whole operand",
        "the first row",
        "every other row",
        "all but the last row",
        "amounts without signs",
        "the sum",
        "addresses of x and out",
        "the address of out",
        "the number of the step",
    ],
)
def test_what_another_pass_computed_does_not_pass_for_this_one(play: Play, key: str, scenario: str) -> None:
    """Either results are served that are wrong here, or what is looked for never comes again."""
    opponent = Remembers(key)
    duel = play(opponent, scenario)
    assert duel.lost or not opponent.gains, str(duel)


@pytest.mark.parametrize(
    "key",
    [
        "six numbers",
        "the whole operand",
        "the first row",
        "amounts without signs",
        "addresses of x and out",
        "the address of x",
        "nothing",
    ],
)
def test_what_another_forward_of_the_pass_computed_does_not_pass_for_this_one(play: Play, key: str) -> None:
    opponent = Remembers(key, within_a_pass=True)
    duel = play(opponent, "prefill")
    assert duel.lost or not opponent.gains, str(duel)


@pytest.mark.parametrize("op", ["latent_attention", "o_proj", "expanded_attention"])
@pytest.mark.parametrize("key", ["six numbers", "the whole operand", "the address of x", "nothing"])
def test_an_op_alone_cannot_remember_either(play: Play, key: str, op: str) -> None:
    kind = "linear" if op == "o_proj" else op
    opponent = Remembers(key, kinds=(kind,))
    duel = play(opponent, f"op {op}", *("--batch", "8", "--runs", "8", "--passes", "6"), *kv(op))
    assert opponent.gains or duel.stands
    assert duel.lost or not opponent.gains, str(duel)


def kv(op: str) -> tuple[str, ...]:
    return ("--kv", "100") if op.endswith("attention") else ()
