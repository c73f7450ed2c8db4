"""Ceilings: declared ones are taken as they are, others are measured and named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mla
from mla.bench import ceilings, results
from mla.bench.ceilings import Ceilings
from mla.bench.implementations import Setting
from mla_backends.api import DeviceInfo, Peak


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setattr(ceilings, "_MEASURED", {})
    monkeypatch.setattr(ceilings, "SIDES", (64, 128))
    monkeypatch.setattr(ceilings, "SECONDS", 0.0)
    backend = mla.load_backend("cpu")
    return Setting(mla.MLAConfig.preset("deepseek-v2-lite"), backend, torch.bfloat16, "auto", 64, 0)


def test_what_is_unknown_is_measured_once_and_says_how(setting: Setting) -> None:
    found = Ceilings(setting)
    flops, read = found.flops(), found.bandwidth(3 << 20)
    assert flops.value > 0
    assert flops.source.startswith("measured: ")
    assert "torch.bfloat16" in flops.source
    assert read.value > 0
    assert read.source.endswith(", 3 MiB")
    assert Ceilings(setting).flops() is flops
    assert found.bandwidth((3 << 20) + 1) is read  # the same rows
    assert found.bandwidth(9 << 20) is not read


def test_the_nearer_limit_is_the_floor(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    info = DeviceInfo("x", bandwidth=Peak(1e9, "a sheet"), flops={"bfloat16": Peak(1e12, "another sheet")})
    monkeypatch.setattr(setting.backend, "device_info", lambda: info)
    found = Ceilings(setting)
    memory = found.roofline(results.Cost(flops=10**9, bytes=2 * 10**6), latency_ms=8.0)
    assert (memory.floor_ms, memory.fraction, memory.bound) == (2.0, 0.25, "memory")
    assert memory.peak_source == "a sheet"
    compute = found.roofline(results.Cost(flops=5 * 10**9, bytes=2 * 10**6), latency_ms=10.0)
    assert (compute.floor_ms, compute.fraction, compute.bound) == (5.0, 0.5, "compute")
    assert compute.peak_source == "another sheet"


def test_a_run_reports_its_limit(bench: Any, small: list[str]) -> None:
    done = bench("--backend", "cpu", *small, "--format", "json")
    for case in results.decode(done.out.encode()).cases:
        assert case.roofline.bound in ("memory", "compute")
        assert case.roofline.fraction is not None
        assert (case.roofline.peak_source or "").startswith("measured: ")


def test_a_device_that_cannot_run_the_yardstick_keeps_its_numbers(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Ceilings, rows: int) -> dict[str, Any]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Ceilings, "_reads", refuse)
    found = Ceilings(setting).roofline(results.Cost(flops=10**9, bytes=2 * 10**6), latency_ms=8.0)
    assert found == results.Roofline()


def test_a_long_context_is_not_allocated_a_second_time(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(Ceilings, "_fastest_read", lambda self, rows: asked.append(rows) or Peak(1.0, "x"))
    Ceilings(setting).bandwidth(64 << 30)
    assert [rows * ceilings.FEATURES * 2 for rows in asked] == [ceilings.MOST_BYTES]
