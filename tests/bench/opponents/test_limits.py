"""Limits that depend on the backend make no percentage."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from opponents.base import Opponent
from opponents.limits import SlowWait, TooFast, WarmingWait

from mla_backends.api import Peak

Play = Callable[..., Any]
URL = "https://opponent.example/sheet"
COLD = ("--mode", "eager", "--cache", "warm,cold", "--clock", "host")
Honest = Callable[[str], dict[str, float]]
# A sweep of less is not called cold.
SWEPT_MIB = 32

_limits: dict[str, dict[str, float]] = {}


@pytest.fixture
def honest(play: Play) -> Honest:
    """Return a function that measures the limits of an honest run, once per scenario: work -> the highest."""

    def honest(scenario: str) -> dict[str, float]:
        if scenario not in _limits:
            ceilings = sorted(play(Opponent(), scenario).run.ceilings, key=lambda ceiling: ceiling.value)
            _limits[scenario] = {ceiling.work: ceiling.value for ceiling in ceilings}
        return _limits[scenario]

    return honest


@pytest.fixture(autouse=True)
def _flush_little() -> None:
    """Sweeps are as large here as they are in a run: some tests look at that."""


@pytest.mark.parametrize(
    ("what", "factor", "scenario"),
    [
        (("bandwidth",), 30, "decode"),
        (("flops",), 3, "prefill"),
        (("flops",), 30, "decode"),
        (("bandwidth", "flops"), 3, "prefill"),
        (("bandwidth", "flops"), 30, "decode"),
    ],
)
def test_a_declared_peak_that_is_too_low(
    play: Play, honest: Honest, what: tuple[str, ...], factor: float, scenario: str
) -> None:
    """What can be measured is not below the peak, so the peak is in doubt or the measured limit counts."""
    limits = honest(scenario)
    peaks: dict[str, Any] = {}
    if "bandwidth" in what:
        peaks["bandwidth"] = Peak(limits["read"] / factor, URL)
    if "flops" in what:
        peaks["flops"] = {"float32": Peak(limits["matmul"] / factor, URL)}
    duel = play(Opponent(**peaks), scenario)
    case = duel.case()
    false = case.roofline.peak_source == URL and case.roofline.fraction is not None
    assert not false, str(duel)
    assert (case.roofline.fraction or 0) <= 1, str(duel)


@pytest.mark.parametrize(
    ("ms", "collecting_only", "scenario"), [(3.0, True, "prefill"), (1.0, False, "prefill")]
)
def test_a_wait_that_is_slow_while_limits_are_measured(
    play: Play, honest: Honest, ms: float, collecting_only: bool, scenario: str
) -> None:
    """The ops are honest: what is wrong is the limit, if it is at all."""
    limits = honest(scenario)
    duel = play(SlowWait(ms, collecting_only), scenario)
    assert (duel.case().roofline.fraction or 0) <= 1, str(duel)
    measured = {ceiling.work: ceiling.value for ceiling in duel.run.ceilings}
    lower = [work for work in limits if measured[work] < limits[work] / 3]
    assert duel.number_or_percentage_lost or not lower, str(duel)


@pytest.mark.parametrize("cache_bytes", [4096, 64 << 10, 1 << 20])
def test_a_sweep_of_a_tiny_declared_cache_is_not_called_cold(play: Play, cache_bytes: int) -> None:
    duel = play(Opponent(cache_bytes=cache_bytes), ways=COLD)
    for cold in [timing for timing in duel.case().timings if timing.latency_ms is not None]:
        swept = re.search(r"([\d.]+) (\w)iB", cold.method)
        assert swept, cold.method
        assert float(swept[1]) * {"K": 1 / 1024, "M": 1, "G": 1024}[swept[2]] >= SWEPT_MIB, cold.method


def test_a_wait_that_reads_the_weights_again_has_no_turn_between_the_sweep_and_the_clock(play: Play) -> None:
    opponent = WarmingWait(cache_bytes=16 << 20)
    duel = play(opponent, ways=COLD)
    assert duel.lost or opponent.turns < 0.3 * opponent.forwards, "only forwards that make no number"


@pytest.mark.parametrize(("rows", "share"), [(1024, 0.0), (1024, 0.5), (2048, 0.0)])
def test_a_product_that_is_too_fast_is_no_limit(play: Play, honest: Honest, rows: int, share: float) -> None:
    """It returns at once, or computes half of its rows: wrong products do not count, however fast."""
    limit = honest("decode")["matmul"]
    duel = play(TooFast(rows, share))
    assert max(ceiling.value for ceiling in duel.run.ceilings if ceiling.work == "matmul") < 1.8 * limit, str(
        duel
    )
    assert (duel.case().roofline.fraction or 0) <= 1
