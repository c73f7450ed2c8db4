"""Estimates of time: what they add up, and that they do not cost what they are to save."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mla.bench.limits.roofline import RooflineModel
from mla.bench.plan import estimate, rates
from mla.bench.plan.rates import Rates, measure_rates
from mla.bench.run import scheduler

Bench = Callable[..., Any]


@pytest.fixture
def request_of(bench: Bench, small: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that resolves options without running them."""

    def request_of(*words: str) -> Any:
        found: list[Any] = []

        def measure(request: Any, *others: Any) -> Any:
            found.append(request)
            raise KeyboardInterrupt

        monkeypatch.setattr(scheduler, "measure", measure)
        bench("--backend", "cpu", "--threads", "1", *small, *words)
        return found[0]

    return request_of


def test_the_least_is_one_pass_of_the_headline_and_all_checks(request_of: Any) -> None:
    request = request_of("--scenario", "decode", "--implementations", "mla")
    rated = Rates(flops=1e30, bandwidth=1e30, float64=1e30, overhead=1.0)  # a second for each forward
    (scenario,) = request.scenarios
    few = estimate.Estimator(request.variants.timed, rated)
    checked, warmups, steps, passes = 4, 1, 4, 6
    rest = few.preparation(scenario, ["mla"])
    assert few.seconds(scenario, ["mla"]) - rest == pytest.approx(checked + warmups + passes * steps)
    assert few.least(scenario, ["mla"]) - rest == pytest.approx(checked + warmups + steps)


def test_what_is_needed_beside_the_passes_is_bounded_where_it_ends_by_the_clock(request_of: Any) -> None:
    request = request_of("--scenario", "decode", "--implementations", "mla")
    (scenario,) = request.scenarios
    passes = 6
    for each, evidence in ((0.01, 60 * 0.01 + passes * 0.01), (10.0, 8.0 + 8 * 10.0)):
        rated = Rates(flops=1e30, bandwidth=1e30, float64=1e30, overhead=each)
        found = estimate.Estimator(request.variants.timed, rated).beside(scenario, ["mla"])
        assert found == pytest.approx(estimate.LIMITS + evidence)


def test_sweeping_a_cold_cache_takes_time(request_of: Any, tmp_path: Path) -> None:
    request = request_of("--scenario", "decode", "--implementations", "mla", "--cache", "cold")
    (scenario,) = request.scenarios
    rated = Rates(flops=1e30, bandwidth=1e9, float64=1e30, overhead=0.0)
    small, large = (
        estimate.Estimator(request.variants.timed, rated, cache_bytes) for cache_bytes in (0, 1 << 30)
    )
    assert small.least(scenario, ["mla"]) < small.seconds(scenario, ["mla"]) / 2
    ratio = large.seconds(scenario, ["mla"]) / small.seconds(scenario, ["mla"])
    assert ratio == pytest.approx((1 << 30) / (32 << 20), rel=0.05)


def test_a_budget_measures_no_limit_before_it_decides(
    request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limits take seconds to measure, more than a tiny run in all."""
    request = request_of("--scenario", "decode")

    def never(*arguments: Any) -> Any:
        raise AssertionError("a limit was measured")

    for name in ("flops", "bandwidth"):
        monkeypatch.setattr(RooflineModel, name, never)
    assert estimate.measured(request).measured


def test_a_slow_device_ends_the_probing_early(request_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that take 9 ms already at 256: a larger one would take 64 times as long."""
    request = request_of("--scenario", "decode")
    sides: list[int] = []

    def slow(call: Any, wait: Any) -> float:
        found = call()
        if isinstance(found, torch.Tensor) and found.dim() == 2:
            sides.append(found.shape[0])
        return 9e-3

    monkeypatch.setattr(rates, "_seconds", slow)
    assert measure_rates(request.setting).flops == pytest.approx(2 * 256**3 / 9e-3)
    assert max(sides) == 256


def test_a_device_that_cannot_be_measured_has_nominal_rates(
    request_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of("--scenario", "decode")
    monkeypatch.setattr(request.setting.backend, "synchronize", None)
    assert not estimate.measured(request).measured


def test_a_slow_yardstick_is_estimated_as_it_runs(request_of: Any) -> None:
    """Forwards of ours take 1 s, and those of the reference what torch reaches, at least."""
    request = request_of("--scenario", "decode", "--implementations", "mla,mla-reference")
    (scenario,) = request.scenarios
    flops, both = scenario.needs.forward.flops, ["mla", "mla-reference"]
    rated = Rates(flops=2.0 * flops, bandwidth=1e30, float64=1e30, overhead=0.0)
    slow = dataclasses.replace(rated, by_torch=flops / 5)
    checked, warmed, steps = 3, 1, 3
    for rates_of, each in ((rated, 2.5), (slow, 5.0)):
        found = estimate.Estimator(request.variants.timed, rates_of)
        assert found.forward(scenario, "mla") == pytest.approx(1.0)
        assert found.forward(scenario, "mla-reference") == pytest.approx(each)
        for seconds, passes in ((found.seconds, 6), (found.least, 1)):
            alone = seconds(scenario, both[1:], "mla") - found.preparation(scenario, both[1:])
            assert alone == pytest.approx(each * (checked + warmed + passes * steps))
            together = seconds(scenario, both) - seconds(scenario, ["mla"])
            assert together == pytest.approx(alone, rel=1e-3)
        assert found.one_pass(scenario, both, "mla") == pytest.approx(max(4.0, each * steps))
