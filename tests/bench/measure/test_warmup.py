"""The warm-up's rule: at least so many, until they settle, within bounds; on scripted milliseconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, count, repeat

import pytest

from mla.bench.measure.passes import MAX_EXTRA, MIN_WARMUPS, WARMUP_S, WINDOW, settled, warm_up
from mla.bench.measure.samples import WarmupResult


class Script:
    """Forwards, and the clock that they advance; `log` holds what was called."""

    def __init__(self, samples: Sequence[float], then: float = 1.0) -> None:
        self._samples: Iterator[float] = chain(samples, repeat(then))
        self.log: list[str] = []
        self.ticks: list[int] = []
        self.numbers: list[int] = []

    def restore(self, number: int = 0) -> None:
        self.numbers.append(number)
        self.log.append("restore")

    def before(self, index: int) -> None:
        pass

    def step(self, index: int) -> None:
        self.log.append(f"step {index}")

    def time(self, index: int) -> float:
        self.step(index)
        return next(self._samples)

    def after(self, index: int) -> None:
        pass

    def warm_up(self, least: int, steps: int = 1000, must: int = 0) -> WarmupResult:
        return warm_up(self, steps, least, self.time, count(7), self.ticks.append, must)


def test_settled_forwards_end_with_the_number_asked_for() -> None:
    script = Script([])
    assert script.warm_up(12) == WarmupResult(12, True)
    assert script.ticks == [1] * 12


def test_it_takes_two_windows_to_see_that_forwards_have_settled() -> None:
    script = Script([])
    assert script.warm_up(1) == WarmupResult(2 * WINDOW, True)
    assert script.ticks == [1] + [0] * (2 * WINDOW - 1)


def test_zero_asks_for_none() -> None:
    script = Script([])
    assert script.warm_up(0) == WarmupResult(0, None)
    assert script.log == []


def test_what_never_settles_ends_at_the_limit() -> None:
    assert Script([1.1**i for i in range(40)] * 10).warm_up(5).settled is False
    alternating = ([1.0] * WINDOW + [2.0] * WINDOW) * 100
    changing = [1.0 + 0.5 * i for i in range(15)]
    assert Script(changing * 20 + alternating).warm_up(3).forwards <= 3 + MAX_EXTRA


HANG, GROWING = 1e3 * WARMUP_S, [1.2**i for i in range(8)]


@pytest.mark.parametrize(
    ("samples", "least", "ran", "settles"),
    [
        # A slow start is waited for: both windows must lie mostly behind 20 forwards at twice the time.
        ([2.0] * 20, 18, 18, True),  # nothing has changed yet
        ([2.0 - 0.05 * i for i in range(20)], 10, 27, True),
        # A hang ends the warm-up as soon as a few were run.
        ([1.0, HANG, *GROWING], 4, MIN_WARMUPS, False),
        ([HANG, HANG, *GROWING], 1, MIN_WARMUPS, True),
        ([*GROWING, HANG, 1e5], 4, 9, False),
        # Long forwards have fewer and shorter windows: what the first one loads does not count.
        ([1500.0, 2000.0], 10, MIN_WARMUPS, False),
        ([2500.0] + [2000.0] * 20, 10, MIN_WARMUPS, None),
        ([1200.0] + [1000.0] * 20, 10, 3, True),
        ([700.0, 950.0, 1050.0], 10, 3, False),
        ([280.0] * 20, 10, 9, True),
        ([380.0] * 4 + [200.0] * 9, 10, 9, False),
    ],
)
def test_it_ends_once_forwards_have_settled_or_took_too_long(
    samples: list[float], least: int, ran: int, settles: bool | None
) -> None:
    assert Script(samples).warm_up(least) == WarmupResult(ran, settles)


def test_a_first_forward_that_compiles_ends_no_warm_up_and_is_no_measure() -> None:
    for least, ran in ((10, 10), (2, 2 * WINDOW), (1, 2 * WINDOW)):
        result = Script([8000.0]).warm_up(least)
        assert (result, result.ms) == (WarmupResult(ran, True), 1.0)


def test_a_count_that_was_asked_for_is_run_whatever_it_takes() -> None:
    slow = [3000.0 - 200 * i for i in range(12)]
    assert Script(slow).warm_up(10).forwards == MIN_WARMUPS
    assert Script(slow).warm_up(10, must=10) == WarmupResult(10, False)
    assert Script([3000.0] * 12).warm_up(10, must=10) == WarmupResult(10, True)


def test_a_decode_pass_that_is_over_is_restored() -> None:
    script = Script([])
    script.warm_up(10, steps=4)
    passes = ["restore", "step 0", "step 1", "step 2", "step 3"]
    assert script.log == [*passes, *passes, "restore", "step 0", "step 1"]
    assert script.numbers == [7, 8, 9], "each pass has inputs of its own"


@pytest.mark.parametrize(("now", "expected"), [(1.049, True), (1.051, False), (0.951, True), (0.949, False)])
def test_windows_within_five_percent_are_alike(now: float, expected: bool) -> None:
    assert settled([1.0] * WINDOW + [now] * WINDOW) == expected
    assert settled([9.0] + [1.0] * WINDOW + [now] * WINDOW) == expected
