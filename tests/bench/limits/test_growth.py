"""Seconds per call: what is constant drops out, noise only adds, and no result is absurd."""

from __future__ import annotations

import gc
import itertools

import pytest

from mla.bench.limits import growth
from mla.bench.limits.growth import grown, no_garbage_collection, per_call


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "SECONDS", 0.0)


@pytest.mark.parametrize("constant", [0.0, 1e-4, 3e-3, 9e-3])
@pytest.mark.parametrize("each", [1e-5, 3e-4, 5e-2])
def test_what_a_region_costs_whatever_it_holds_drops_out(constant: float, each: float) -> None:
    assert per_call(lambda calls: constant + calls * each) == pytest.approx(each, rel=1e-6)


def test_one_quiet_repetition_of_each_region_is_enough() -> None:
    noise = itertools.cycle([0.7, 0.0, 0.3, 0.0, 0.9])
    assert per_call(lambda calls: calls * 1e-3 + next(noise) * 1e-3) == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parametrize(
    ("short", "long", "least", "most"),
    [
        (1.0, 2.0, 1.0, 1.0),
        (2.0, 3.0, 1.0, 1.0),  # a constant cost as large as the work
        (1.9, 2.0, 1.0, 1.0),  # the shorter ones alone were disturbed
        (5.0, 2.0, 0.5, 1.0),  # nothing but noise: not negative
        (2.0, 2.0, 0.5, 1.0),
        (1.0, 9.0, 1.0, 1.0),  # noise in the longer one: the shorter one alone is a bound
    ],
)
def test_noise_makes_no_result_absurd(short: float, long: float, least: float, most: float) -> None:
    assert least <= grown(short, long, 1) <= most
    assert grown(7 * short, 7 * long, 7) == pytest.approx(grown(short, long, 1))


def test_a_call_of_seconds_is_made_twice() -> None:
    asked: list[int] = []

    def region(calls: int) -> float:
        asked.append(calls)
        return 9.0 / len(asked)

    assert per_call(region) == 4.5
    assert asked == [1, 1]


def asked(each: float = 1e-3, **limits: float) -> list[int]:
    """Return the calls of every region that was asked for."""
    found: list[int] = []

    def region(calls: int) -> float:
        found.append(calls)
        return calls * each

    per_call(region, **limits)  # type: ignore[arg-type]
    return found


def test_no_region_has_more_calls_than_there_are_outputs_for() -> None:
    for most in range(2, 40):
        assert max(asked(1e-9, most_calls=most)) <= most


def test_a_way_that_cannot_win_is_not_repeated() -> None:
    counts = [len(asked(enough=enough)) for enough in (2.0, 1e-6)]
    assert counts[1] < counts[0]


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_off_as_it_is_while_forwards_are_timed(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with no_garbage_collection():
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
