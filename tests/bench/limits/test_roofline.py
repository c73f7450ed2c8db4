"""The limits of a setting: the highest of what is declared and measured, measured again, and named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import mla
from mla.bench import results
from mla.bench.limits import microbench, roofline
from mla.bench.limits.microbench import Microbenchmark
from mla.bench.limits.roofline import GRAIN, MAX_READ_BYTES, MAX_TIMES, TIMES, RooflineModel, limits, place
from mla.bench.results.schema import Ceiling
from mla.bench.subjects.setting import Setting
from mla_backends.api import DeviceInfo, Peak


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setattr(roofline, "_MEASURED", {})
    monkeypatch.setattr(microbench, "SIDES", (64, 128))
    monkeypatch.setattr(microbench, "REPEAT_S", 0.0)
    backend = mla.load_backend("cpu")
    return Setting(mla.MLAConfig.preset("deepseek-v2-lite"), backend, torch.bfloat16, "auto", 64, 0)


class Scripted:
    """Measurements that are known, in the order in which they are asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Any] = []
        self.reads: Callable[[int], float] = lambda size: 1e9
        self.products: Callable[[int], float] = lambda number: 1e12
        monkeypatch.setattr(Microbenchmark, "read", lambda benchmark, size: self.read(size))
        monkeypatch.setattr(Microbenchmark, "square", lambda benchmark: self.square())

    def read(self, size: int) -> Ceiling:
        self.asked.append(size)
        return Ceiling(work="read", value=self.reads(size), source="measured: x", footprint_bytes=size)

    def square(self) -> Ceiling:
        self.asked.append("square")
        value = self.products(self.asked.count("square"))
        return Ceiling(work="matmul", value=value, source="measured: mine, y", dtype="bfloat16", ours=True)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    return Scripted(monkeypatch)


def declare(setting: Setting, monkeypatch: pytest.MonkeyPatch, bandwidth: float, flops: float) -> None:
    peaks = Peak(bandwidth, "a sheet"), {"bfloat16": Peak(flops, "another sheet")}
    info = DeviceInfo("x", bandwidth=peaks[0], flops=peaks[1])
    monkeypatch.setattr(setting.backend, "device_info", lambda: info)


def known(model: RooflineModel, footprint: int = 8 << 20) -> tuple[Ceiling, Ceiling]:
    """Return the limits of reading so many bytes and of products."""
    limits = model.known(footprint)
    assert limits is not None
    return limits


def test_what_is_unknown_is_measured_once_and_says_how(setting: Setting) -> None:
    read, flops = known(RooflineModel(setting), 30 << 20)
    assert flops.value == flops.lowest > 0
    assert flops.source.startswith("measured: ")
    assert flops.source.endswith(" bfloat16")
    assert read.value == read.lowest > 0
    assert read.source.endswith(", 30 MiB")
    assert known(RooflineModel(setting), (30 << 20) + 1) == (read, flops)  # the same footprint
    assert known(RooflineModel(setting), 9 << 20)[0].source.endswith(", 9 MiB")


@pytest.mark.parametrize("count", [1, 1 << 18, (1 << 22) - 1, 50_000_000, 51_000_000, 1 << 40])
def test_a_footprint_is_at_most_an_eighth_smaller_than_what_is_asked_for(
    setting: Setting, script: Scripted, count: int
) -> None:
    RooflineModel(setting).known(count)
    wanted = max(GRAIN, min(count, MAX_READ_BYTES))  # a long context is not made twice
    assert wanted * 7 / 8 < script.asked[0] <= wanted
    assert script.asked[0] % GRAIN == 0


def test_a_rate_reached_on_more_bytes_is_a_limit_of_few_too(setting: Setting, script: Scripted) -> None:
    """Few bytes cost as much per byte, and a launch besides, which a kernel of ours may save."""
    script.reads = lambda size: 5e9 if size == 1 << 20 else 1e9
    model = RooflineModel(setting)
    read, _ = known(model, 1 << 18)
    assert (read.value, read.footprint_bytes) == (5e9, 1 << 20)
    assert known(model, 2 << 20)[0].value == 1e9
    assert 1 << 22 in script.asked


def test_the_nearer_limit_is_the_floor(setting: Setting, script: Scripted) -> None:
    limits = known(RooflineModel(setting), 2 * 10**6)
    memory = place(results.Cost(flops=10**9, bytes=2 * 10**6), 8.0, *limits)
    assert (memory.floor_ms, memory.fraction, memory.bound) == (2.0, 0.25, "memory")
    assert memory.peak_source == "measured: x"
    compute = place(results.Cost(flops=5 * 10**9, bytes=2 * 10**6), 10.0, *limits)
    assert (compute.floor_ms, compute.fraction, compute.bound) == (5.0, 0.5, "compute")
    assert compute.peak_source == "measured: mine, y"


@pytest.mark.parametrize(("low", "said"), [(3.0, "333 MB/s"), (10.0, "100 MB/s"), (1000.0, "1 MB/s")])
def test_a_declared_peak_that_is_too_low_loses_and_is_named(
    setting: Setting, script: Scripted, monkeypatch: pytest.MonkeyPatch, low: float, said: str
) -> None:
    declare(setting, monkeypatch, 1e9 / low, 1e12 / low)
    read, product = known(RooflineModel(setting))
    assert (read.value, product.value, product.ours) == (1e9, 1e12, True)
    assert read.source == f"measured: x; declared: {said}, a sheet"
    assert product.source.startswith("measured: mine, y; declared: ")
    assert product.source.endswith("FLOP/s, another sheet")


@pytest.mark.parametrize("high", [2.0, 1000.0])
def test_a_declared_peak_that_is_higher_wins_and_no_longer_is_our_own(
    setting: Setting, script: Scripted, monkeypatch: pytest.MonkeyPatch, high: float
) -> None:
    declare(setting, monkeypatch, 1e9 * high, 1e12 * high)
    read, product = known(RooflineModel(setting))
    assert (read.value, product.value) == (1e9 * high, 1e12 * high)
    assert read.source == "a sheet; measured: x: 1 GB/s"
    assert product.source == "another sheet; measured: mine, y: 1 TFLOP/s"
    assert (product.ours, product.lowest, product.dtype) == (False, None, "bfloat16")


def test_a_declared_peak_serves_a_device_that_cannot_be_measured(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    declare(setting, monkeypatch, 1e9, 1e12)

    def refuse(*sizes: Any) -> Ceiling:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Microbenchmark, "read", refuse)
    monkeypatch.setattr(Microbenchmark, "square", refuse)
    model = RooflineModel(setting)
    assert place(results.Cost(flops=1, bytes=10**6), 4.0, *known(model)).fraction == 0.25
    assert model.used() == [
        Ceiling(work="read", value=1e9, source="a sheet"),
        Ceiling(work="matmul", value=1e12, source="another sheet", dtype="bfloat16"),
    ]


def test_a_declared_peak_serves_a_footprint_that_cannot_be_read(
    setting: Setting, script: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    declare(setting, monkeypatch, 1e9, 1e12)
    model = RooflineModel(setting)
    model.known(1 << 18)
    monkeypatch.setattr(Microbenchmark, "read", lambda *sizes: 1 / 0)
    assert known(model)[0].source == "a sheet"


def test_the_highest_of_several_measurements_is_kept_with_the_lowest(
    setting: Setting, script: Scripted
) -> None:
    values = {1: 3e12, 2: 2.6e12, 3: 3.1e12, 4: 3e12}
    script.products = lambda number: values[number]
    model = RooflineModel(setting)
    model.known(8 << 20)
    for _ in range(3):
        model.again(4)
    product = known(model)[1]
    assert (product.value, product.lowest) == (3.1e12, 2.6e12)
    assert model.used()[1] == product


def test_a_limit_is_measured_twice_in_a_run_whatever_its_scenarios_and_a_few_times_at_most(
    setting: Setting, script: Scripted
) -> None:
    for _ in range(3):
        model = RooflineModel(setting)
        model.known(8 << 20)
        model.again()
    assert script.asked == [8 << 20, "square"] * TIMES
    for _ in range(20):
        model.again(MAX_TIMES)
    assert script.asked.count("square") == MAX_TIMES


def test_what_fails_when_measured_again_stands(setting: Setting, script: Scripted) -> None:
    def once(number: int) -> float:
        if number > 1:
            raise RuntimeError("out of memory")
        return 7e12

    script.products = once
    model = RooflineModel(setting)
    model.known(8 << 20)
    for _ in range(3):
        model.again()
    assert known(model)[1].value == 7e12
    assert script.asked.count("square") == 2


def test_a_device_that_cannot_run_the_microbenchmark_keeps_its_numbers(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Microbenchmark, size: int) -> Ceiling:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Microbenchmark, "read", refuse)
    model = RooflineModel(setting)
    cost = results.Cost(flops=10**9, bytes=2 * 10**6)
    assert model.known(cost.bytes) is None
    assert (model.above(cost, 1e-9), model.implausible(cost, 1e-9)) == (False, "")
    model.again()
    assert model.used() == []


def test_a_run_reports_its_limits_and_places_all_cases_under_the_highest(
    bench: Any, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline, "_MEASURED", {})
    run = results.decode(bench("--backend", "cpu", *small, "--format", "json").out.encode())
    assert {ceiling.work for ceiling in run.ceilings} == {"read", "matmul"}
    for ceiling in run.ceilings:
        assert ceiling.source.startswith("measured: ")
        assert ceiling.lowest is not None
        assert 0 < ceiling.lowest <= ceiling.value
    for case in run.cases:
        peaks = limits(run.ceilings, case.dtype, case.cost.bytes)
        assert peaks is not None
        read, product = peaks
        floors = 1e3 * case.cost.bytes / read.value, 1e3 * case.cost.flops / product.value
        assert case.roofline.floor_ms == pytest.approx(max(floors))
        assert case.roofline.peak_source in (read.source, product.source)
