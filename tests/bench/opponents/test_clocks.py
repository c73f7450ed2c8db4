"""A device's clock that contradicts the host's costs the number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from opponents.clocks import LyingTimer

Play = Callable[..., Any]
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
