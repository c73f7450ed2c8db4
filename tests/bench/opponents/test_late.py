"""Work that its clock does not see is found: done before the start or after the stop, or told shorter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from opponents.ahead import Ahead
from opponents.late import COPIES, HastyClock, Late, LyingTimer

Play = Callable[..., Any]


@pytest.mark.parametrize(
    ("waits", "copies"),
    [
        ("at a start", ()),
        ("at a start", ("cpu",)),
        ("at a start", COPIES),
        ("never", ()),
        ("never", COPIES),
        ("when a pass begins", COPIES),
    ],
)
def test_a_wait_that_does_not_wait_at_the_stop(play: Play, waits: str, copies: tuple[str, ...]) -> None:
    """Outputs are not there when their clock has stopped, or a copy waits for them."""
    duel = play(Late(waits, copies))
    assert duel.lost, str(duel)


@pytest.mark.parametrize(
    ("waits", "scenario"),
    [
        ("every 2nd stop", "decode"),
        ("every 5th stop", "prefill"),
        ("4 stops of 5", "decode"),
        ("4 stops of 5", "prefill"),
    ],
)
def test_a_wait_that_waits_only_now_and_then(play: Play, waits: str, scenario: str) -> None:
    duel = play(Late(waits, COPIES), scenario)
    assert duel.lost, str(duel)


@pytest.mark.parametrize("waits", ["every 2nd stop", "never"])
def test_an_op_alone_that_is_late(play: Play, waits: str) -> None:
    opponent = Late(waits, COPIES, kinds=("latent_attention",))
    duel = play(opponent, "op latent_attention", "--batch", "8", "--kv", "100", "--runs", "8")
    assert duel.lost, str(duel)


def test_a_device_timer_that_reads_before_it_waits(play: Play) -> None:
    duel = play(HastyClock(), ways=("--mode", "eager", "--cache", "warm"))
    assert duel.lost, str(duel)


@pytest.mark.parametrize("scenario", ["prefill", "decode"])
@pytest.mark.parametrize("whole", [False, True], ids=["the next forward", "the whole pass"])
def test_a_forward_that_is_computed_while_the_runner_waits(play: Play, whole: bool, scenario: str) -> None:
    opponent = Ahead(whole)
    duel = play(opponent, scenario)
    assert duel.lost or opponent.hardly_eased, str(duel)


BOTH = ("--mode", "eager", "--cache", "warm", "--clock", "host,device")


@pytest.mark.parametrize(
    ("lie", "scenario"),
    [
        ("divides by 10", "prefill"),
        ("divides by 3", "decode"),
        ("says 0.69 of it", "decode"),
        ("multiplies by 10", "decode"),
        ("constant", "prefill"),
    ],
)
def test_a_device_clock_that_contradicts_the_hosts(play: Play, lie: str, scenario: str) -> None:
    duel = play(LyingTimer(device=lie), scenario, ways=BOTH)
    assert duel.lost, str(duel)
