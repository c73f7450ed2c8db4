"""A device that hangs ends the run, in a real process; one that works is left alone."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mla.bench import results
from mla.bench.run import scheduler
from mla.bench.run.watchdog import Watchdog

Bench = Callable[..., Any]

LIMIT = 0.2


@pytest.fixture
def hung() -> tuple[threading.Event, list[tuple[str, str]], Callable[[str, str], None]]:
    """Return an event, what was reported, and the function that reports."""
    event, reported = threading.Event(), []

    def report(scenario: str, implementation: str) -> None:
        reported.append((scenario, implementation))
        event.set()

    return event, reported, report


def test_silence_while_watching_is_a_hang(hung: Any) -> None:
    event, reported, report = hung
    with Watchdog(LIMIT, report) as watchdog, watchdog.watching("decode"):
        watchdog.enter("mla")
        assert event.wait(60)
    assert reported == [("decode", "mla")]


def test_neither_beats_nor_silence_of_the_host_are(hung: Any) -> None:
    event, _, report = hung
    with Watchdog(LIMIT, report) as watchdog:
        assert not event.wait(3 * LIMIT), "nothing is watched, as while the oracle is computed"
        with watchdog.watching("decode"):
            beating = threading.Thread(
                target=lambda: [watchdog.beat() or time.sleep(0.001) for _ in range(500)]
            )
            beating.start()
            beating.join()
        assert not event.wait(3 * LIMIT)


def hanging_after(calls: int) -> list[str]:
    """Return the options of a backend whose op hangs after this many calls of decode."""
    fault = f"-O fault=hang -O after={calls} -O tokens=2"
    words = f"--backend fake-wrong-op {fault} --implementations mla --warmups 0"
    return words.split()


def test_a_hanging_op_ends_the_run_and_keeps_what_was_finished(process: Bench, small: list[str]) -> None:
    done = process(*hanging_after(0), *small, "--hang-after", "4s", "-o", "run.json", fakes=["wrong_op"])
    assert done.code == 3
    assert done.error == (
        "error: scenario 'decode', implementation 'mla': no forward finished in 4 s, so the device is "
        "assumed to hang; raise --hang-after to wait longer."
    )
    (case,) = results.read(Path("run.json")).cases
    assert (case.scenario, case.check.status, case.passes) == ("prefill", "ok", 6)
    assert "Prefill Latency: " in done.out


def test_a_hang_in_a_timed_pass_is_noticed(process: Bench, small: list[str]) -> None:
    """Decode alone: 4 forwards of the check, 1 before the passes, and the hang in the second of a pass."""
    done = process(
        *hanging_after(6), *small, "--scenario", "decode", "--hang-after", "4s", fakes=["wrong_op"]
    )
    assert done.code == 3
    assert "no forward finished in 4 s" in done.error


def test_every_forward_of_a_run_is_a_sign_of_life(
    bench: Bench, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    callers: Counter[str] = Counter()

    class Counting(Watchdog):
        def beat(self) -> None:
            super().beat()
            callers[sys._getframe(1).f_code.co_name] += 1

    monkeypatch.setattr(scheduler, "Watchdog", Counting)
    virtual = ("--backend", "fake-virtual-clock", "--scenario", "decode")
    assert bench(*virtual, *small, fakes=["virtual_clock"]).code == 0
    assert callers["run"] >= 6 * 4
    assert callers["_tick"] >= 4 + 1, "the check and the warm-up"
