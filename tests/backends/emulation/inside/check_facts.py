"""What a backend tells about its device: memory, clocks, dtypes, and the environment of a result."""

from __future__ import annotations

from typing import Any

import emulated
import pytest
import torch
from tiny_run import HEADLINE

import mla

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def test_the_device_is_described(backend: Any, vendor: Any, state: Any) -> None:
    info = backend.device_info()
    assert info.name == state.card.name
    assert info.memory_bytes == state.card.memory << 30
    assert info.cache_bytes == vendor.cache
    assert bool(info.bandwidth) == bool(info.flops) == bool(vendor.peak)
    assert not info.bandwidth or info.bandwidth.source.startswith(vendor.peak)


def test_memory_is_counted(backend: Any, state: Any) -> None:
    before = backend.memory()
    held = torch.zeros(1 << 20, device=backend.device)
    after = backend.memory()
    assert after.allocated - before.allocated == held.nbytes
    assert before.free - after.free == held.nbytes
    assert after.peak >= after.allocated
    assert after.total == state.card.memory << 30
    backend.empty_cache()


def test_the_device_clock_counts_the_device_only(backend: Any) -> None:
    timer = backend.device_timer()
    timer.start()
    passed = timer.stop()
    assert 0 <= passed < 1e4
    assert timer.clock == f"{backend.device.type} events"
    assert backend.timer().clock == "host"


def test_the_device_is_busy_when_the_first_event_is_recorded(
    backend: Any, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an idle device it would take place before the host has launched anything."""
    seen: list[str] = []
    sleep, record = module._sleep, module.Event.record
    monkeypatch.setattr(module, "_sleep", lambda cycles: (seen.append("busy"), sleep(cycles)))
    monkeypatch.setattr(module.Event, "record", lambda event: (seen.append("event"), record(event)))
    timer = backend.device_timer()
    seen.clear()
    timer.start()
    assert seen == ["busy", "event"]
    assert 0 <= timer.stop() < 1e4


def test_dtypes_of_this_card(backend: Any, bench: Any) -> None:
    assert backend.dtypes() == FLOATS


OLD_CARDS = {"moore": "MTT S80", "nvidia": "Tesla T4", "iluvatar": "Iluvatar BI-V100"}


@pytest.mark.only(*OLD_CARDS)
def test_a_card_without_bfloat16_says_so(name: str, state: Any, bench: Any) -> None:
    state.card = emulated.CARDS[OLD_CARDS[name]]
    done = bench()
    assert done.code == 2
    assert done.error == (
        f"error: backend '{name}' does not compute bfloat16 natively; choose --dtype from: float16, float32."
    )
    assert bench("--dtype", "float16", "--scenario", "decode", *HEADLINE).code == 0


@pytest.mark.only("moore", "nvidia")  # the others do not ask torch
def test_an_older_torch_that_counts_emulation_in_is_not_believed(
    name: str, state: Any, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "is_bf16_supported", lambda: True)
    assert mla.load_backend(name).dtypes() == FLOATS
    state.card = emulated.CARDS[OLD_CARDS[name]]
    assert mla.load_backend(name).dtypes() == FLOATS[1:]


def test_the_environment_names_the_stack(backend: Any, vendor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(vendor.variable, "0,1")
    report = backend.environment()
    assert report["device"] == str(backend.device)
    assert report["device_count"] == "2"
    assert report["capability"] == ".".join(map(str, emulated.STATE.card.capability))
    assert report["graphs"] == vendor.graphs
    assert report[vendor.variable] == "0,1"
    assert all(isinstance(value, str) for value in report.values())


def test_a_fact_that_cannot_be_read_costs_no_other(
    backend: Any, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(device: Any = None) -> None:
        raise RuntimeError("lost")

    monkeypatch.setattr(module, "get_device_properties", fail)
    report = backend.environment()
    assert report["capability"] == "unknown (RuntimeError: lost)"
    assert report["device"] == str(backend.device)
