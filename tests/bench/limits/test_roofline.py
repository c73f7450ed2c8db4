"""Rooflines: declared ceilings are taken as they are, others are measured once and named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mla
from mla.bench import results
from mla.bench.limits import microbench, roofline
from mla.bench.limits.microbench import Microbenchmark
from mla.bench.limits.roofline import RooflineModel
from mla.bench.results.schema import Ceiling
from mla.bench.subjects.setting import Setting
from mla_backends.api import DeviceInfo, Peak


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setattr(roofline, "_MEASURED", {})
    monkeypatch.setattr(microbench, "SIDES", (64, 128))
    monkeypatch.setattr(microbench, "SECONDS", 0.0)
    backend = mla.load_backend("cpu")
    return Setting(mla.MLAConfig.preset("deepseek-v2-lite"), backend, torch.bfloat16, "auto", 64, 0)


def test_what_is_unknown_is_measured_once_and_says_how(setting: Setting) -> None:
    found = RooflineModel(setting)
    flops, read = found.flops(), found.bandwidth(3 << 20)
    assert flops.value > 0
    assert flops.source.startswith("measured: ")
    assert flops.source.endswith(" bfloat16")
    assert read.value > 0
    assert read.source.endswith(", 3 MiB")
    assert RooflineModel(setting).flops() is flops
    assert found.bandwidth((3 << 20) + 1) is read  # the same footprint
    assert found.bandwidth(9 << 20) is not read


@pytest.mark.parametrize("count", [1, 1 << 18, (1 << 22) - 1, 50_000_000, 51_000_000, 1 << 40])
def test_a_footprint_is_at_most_an_eighth_smaller_than_what_is_asked_for(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    asked: list[int] = []

    def read(self: Microbenchmark, size: int) -> Ceiling:
        asked.append(size)
        return Ceiling(work="read", value=1.0, source="x", footprint_bytes=size)

    monkeypatch.setattr(Microbenchmark, "read", read)
    RooflineModel(setting).bandwidth(count)
    wanted = max(roofline.GRAIN, min(count, roofline.MOST_BYTES))  # a long context is not made twice
    assert wanted * 7 / 8 < asked[0] <= wanted
    assert asked[0] % roofline.GRAIN == 0


def declare(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    info = DeviceInfo("x", bandwidth=Peak(1e9, "a sheet"), flops={"bfloat16": Peak(1e12, "another sheet")})
    monkeypatch.setattr(setting.backend, "device_info", lambda: info)


def test_the_nearer_limit_is_the_floor(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    declare(setting, monkeypatch)
    found = RooflineModel(setting)
    memory = found.roofline(results.Cost(flops=10**9, bytes=2 * 10**6), latency_ms=8.0)
    assert (memory.floor_ms, memory.fraction, memory.bound) == (2.0, 0.25, "memory")
    assert memory.peak_source == "a sheet"
    compute = found.roofline(results.Cost(flops=5 * 10**9, bytes=2 * 10**6), latency_ms=10.0)
    assert (compute.floor_ms, compute.fraction, compute.bound) == (5.0, 0.5, "compute")
    assert compute.peak_source == "another sheet"


def test_the_ceilings_that_were_used_are_listed_once(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    declare(setting, monkeypatch)
    found = RooflineModel(setting)
    assert found.used() == []
    for _ in range(2):
        found.roofline(results.Cost(flops=1, bytes=1), latency_ms=1.0)
    assert found.used() == [
        Ceiling(work="read", value=1e9, source="a sheet"),
        Ceiling(work="matmul", value=1e12, source="another sheet", dtype="bfloat16"),
    ]


def test_a_part_of_a_forward_is_read_at_the_footprint_of_the_whole(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(self: Microbenchmark, size: int) -> Ceiling:
        return Ceiling(work="read", value=float(size), source="x", footprint_bytes=size)

    monkeypatch.setattr(Microbenchmark, "read", read)
    cost = results.Cost(flops=0, bytes=1 << 20)
    assert RooflineModel(setting).roofline(cost, 1000.0).floor_ms == 1000
    assert RooflineModel(setting).roofline(cost, 1000.0, footprint=1 << 22).floor_ms == 250


def test_a_run_reports_its_limits(bench: Any, small: list[str]) -> None:
    run = results.decode(bench("--backend", "cpu", *small, "--format", "json").out.encode())
    sources = {ceiling.source for ceiling in run.ceilings}
    for case in run.cases:
        assert case.roofline.bound in ("memory", "compute")
        assert case.roofline.fraction is not None
        assert (case.roofline.peak_source or "").startswith("measured: ")
        assert case.roofline.peak_source in sources
    assert [one.work for one in run.ceilings] == ["read", "matmul"]  # both scenarios are as small as can be
    assert run.ceilings[0].footprint_bytes == roofline.GRAIN
    assert run.ceilings[1].dtype == "bfloat16"


def test_a_device_that_cannot_run_the_microbenchmark_keeps_its_numbers(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Microbenchmark, size: int) -> Ceiling:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Microbenchmark, "read", refuse)
    found = RooflineModel(setting)
    assert found.roofline(results.Cost(flops=10**9, bytes=2 * 10**6), 8.0) == results.Roofline()
    assert found.used() == []
