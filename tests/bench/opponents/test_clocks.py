"""Clocks that lie: a number is the runner's own, and a clock that contradicts it costs the number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from opponents.clocks import LyingTimer, PatchedClock

Play = Callable[..., Any]
BOTH = ("--mode", "eager", "--cache", "warm", "--clock", "host,device")


@pytest.mark.parametrize("lie", ["divides by 10", "divides by 3", "constant"])
def test_the_backends_host_timer_makes_no_number(play: Play, lie: str) -> None:
    """The number is what the calls took by their own stopwatch, or there is none."""
    opponent = LyingTimer(host=lie)
    duel = play(opponent)
    typical = opponent.typical_ms()
    assert duel.lost or 0.6 * typical < duel.case().latency_ms.median < 4 * typical, str(duel)


@pytest.mark.parametrize(
    ("lie", "scenario"),
    [
        ("divides by 10", "prefill"),
        ("divides by 3", "decode"),
        ("multiplies by 10", "decode"),
        ("constant", "prefill"),
        ("divides by 10 while nothing is collected", "decode"),
    ],
)
def test_a_device_clock_that_contradicts_the_hosts(play: Play, lie: str, scenario: str) -> None:
    duel = play(LyingTimer(device=lie), scenario, ways=BOTH)
    assert duel.lost, str(duel)


@pytest.mark.parametrize(
    ("names", "rate", "late"),
    [
        (("perf_counter_ns", "perf_counter"), 0.1, False),
        (("perf_counter_ns", "perf_counter"), 3.0, False),
        (("perf_counter_ns",), 0.5, False),
        (("perf_counter",), 0.1, False),
        (("perf_counter_ns", "perf_counter"), 0.1, True),
    ],
)
def test_a_clock_of_the_process_that_was_replaced(
    play: Play, names: tuple[str, ...], rate: float, late: bool
) -> None:
    duel = play(PatchedClock(names, rate, late))
    assert duel.number_or_percentage_lost, str(duel)
    assert duel.lost or "time." in duel.out + duel.err, "what was replaced is named"
