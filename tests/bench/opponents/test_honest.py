"""No false alarms: honest backends that look like opponents keep their numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from opponents.base import Call, Opponent, Sequences
from opponents.honest import Compiles, Noisy, Polls, Rounds, Threads
from opponents.late import Late, LyingTimer
from opponents.limits import SlowWait

Play = Callable[..., Any]

HONEST: dict[str, Callable[[], Opponent]] = {
    "plain": Opponent,
    "noisy": lambda: Noisy(0.3),
    "now and then much slower": lambda: Noisy(0.1, rare=8.0),
    "two threads": lambda: Threads(2),
    "five threads": lambda: Threads(5),
    "compiles at first use": lambda: Compiles(20.0, 1),
    "compiles at first uses": lambda: Compiles(5.0, 3),
    "rounds otherwise": Rounds,
    "a queue that is waited for": lambda: Late("always", finishes=True),
    "a slow wait": lambda: SlowWait(2.0),
    "a wait that polls": lambda: SlowWait(0.2),
    "a wait that looks every ms": lambda: Polls(1.0),
    "a wait that looks every 10 ms": lambda: Polls(10.0),
    "a wait that spins for 2 ms": lambda: Polls(2.0, spins=True),
    "a wait that takes 1 to 5 ms": lambda: SlowWait(1.0, most=5.0),
    "forwards in one call": Sequences,
}


@pytest.mark.parametrize("scenario", ["prefill", "decode"])
@pytest.mark.parametrize("kind", [*HONEST])
def test_an_honest_backend_keeps_its_number(play: Play, kind: str, scenario: str) -> None:
    duel = play(HONEST[kind](), scenario, implementations="mla,mla-reference")
    assert duel.stands, str(duel)
    assert duel.case("mla-reference").check.status == "ok", str(duel)


@pytest.mark.parametrize("scenario", ["prefill", "decode"])
@pytest.mark.parametrize("seed", ["1", "2"])
def test_an_honest_backend_keeps_its_number_whatever_the_inputs(play: Play, seed: str, scenario: str) -> None:
    duel = play(Opponent(), scenario, "--seed", seed)
    assert duel.stands, str(duel)


@pytest.mark.parametrize("attention", ["auto", "expanded"])
def test_an_honest_backend_keeps_its_number_on_either_path(play: Play, attention: str) -> None:
    duel = play(Opponent(), "prefill", "--attention", attention)
    assert duel.stands, str(duel)


@pytest.mark.parametrize("scenario", ["prefill", "decode"])
def test_an_honest_device_clock_is_believed(play: Play, scenario: str) -> None:
    opponent = LyingTimer(device="tells the truth")
    duel = play(opponent, scenario, ways=("--mode", "eager", "--cache", "warm,cold"))
    assert duel.stands, str(duel)
    assert {timing.clock for timing in duel.case().timings if timing.latency_ms is not None} == {
        "host",
        "device",
    }


@pytest.mark.parametrize("ms", [1.0, 10.0])
@pytest.mark.parametrize("scenario", ["prefill", "decode"])
def test_a_device_clock_whose_wait_polls_is_believed(play: Play, scenario: str, ms: float) -> None:
    duel = play(Polls(ms, events=True), scenario, ways=("--mode", "eager", "--cache", "warm"))
    assert duel.stands, str(duel)
    assert {timing.clock for timing in duel.case().timings if timing.latency_ms is not None} == {"device"}


class Interrupted(Polls):
    """Ctrl-C comes while passes are timed."""

    def call(self, call: Call) -> None:
        super().call(call)
        if self.forwards == 120:
            self.forwards += 1
            raise KeyboardInterrupt


def test_an_interrupt_costs_a_device_clock_that_polls_its_own_numbers_alone(play: Play) -> None:
    """Only more forwards could tell that from a clock that lies."""
    duel = play(Interrupted(10.0, events=True), ways=("--mode", "eager", "--cache", "warm"))
    case = duel.case()
    assert case.latency_ms is not None, str(duel)
    assert (case.interrupted, case.check.status, 0 < case.passes < 6) == (True, "ok", True), str(duel)
    assert [(timing.clock, timing.latency_ms, timing.check.reason) for timing in case.timings] == [
        ("device", None, "interrupted")
    ]


@pytest.mark.parametrize("op", ["latent_attention", "o_proj", "write_latent"])
def test_an_honest_op_keeps_its_number(play: Play, op: str) -> None:
    kind = {"o_proj": "linear"}.get(op, op)
    duel = play(Opponent(kinds=(kind,)), f"op {op}", "--batch", "8", "--runs", "10", "--passes", "6")
    assert duel.stands, str(duel)
