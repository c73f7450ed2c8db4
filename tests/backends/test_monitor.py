"""A monitor is bounded and harmless, whatever a management library does."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from mla_backends.monitor import Address, Dialect, Monitor, NvmlSampler


class Sampler:
    """Answers as told, and counts how often it is asked."""

    def __init__(self, answer: Any) -> None:
        self._answer, self.asked = answer, 0

    def facts(self) -> Mapping[str, str]:
        return {"driver": "535", **self.sample()}

    def sample(self) -> Mapping[str, str]:
        self.asked += 1
        return self._answer()


def raising(error: BaseException) -> Any:
    def answer() -> Mapping[str, str]:
        raise error

    return answer


def test_readings_are_text() -> None:
    monitor = Monitor(Sampler(lambda: {"clock_mhz": 1755}))
    assert monitor.sample() == {"clock_mhz": "1755"}
    assert monitor.facts() == {"driver": "535", "clock_mhz": "1755"}


@pytest.mark.parametrize(
    "error", [ImportError("no library"), OSError("no driver"), SystemExit(1), KeyError("clock")], ids=repr
)
def test_whatever_is_raised_becomes_a_remark(error: BaseException) -> None:
    sampler = Sampler(raising(error))
    monitor = Monitor(sampler)
    assert monitor.sample() == {}
    assert monitor.facts()["monitor"].startswith(f"none ({type(error).__name__}")
    assert monitor.sample() == {}
    assert sampler.asked == 1, "a library that failed once is left alone"


def test_a_library_that_hangs_is_left_behind() -> None:
    released = threading.Event()
    sampler = Sampler(lambda: {"late": str(released.wait(60))})
    monitor = Monitor(sampler, timeout_s=0.05)
    try:
        assert monitor.sample() == {}
        assert monitor.facts() == {"monitor": "none (no answer within 0.05 s)"}
        assert sampler.asked == 1
    finally:
        released.set()


def test_a_library_that_breaks_later_keeps_the_facts() -> None:
    answers = iter([{}, {}])
    monitor = Monitor(Sampler(lambda: next(answers)))
    assert monitor.facts() == {"driver": "535"}
    assert monitor.sample() == {}
    assert monitor.sample() == {}
    assert monitor.facts() == {"driver": "535", "monitor": "none (StopIteration)"}


@pytest.mark.parametrize(
    ("visible", "index", "physical"), [(None, 2, 2), ("3", 0, 3), ("5, 1,7", 1, 1), ("0,2", 1, 2)]
)
def test_the_physical_index(visible: str | None, index: int, physical: int) -> None:
    assert Address(index, visible).physical_index() == physical


@pytest.mark.parametrize(("visible", "index"), [("", 0), ("GPU-1,GPU-2", 1), ("3", 1), ("-1", 0)])
def test_an_index_that_would_be_a_guess(visible: str, index: int) -> None:
    with pytest.raises(LookupError, match="has no known physical index"):
        Address(index, visible).physical_index()


EVENT, THROTTLE = "nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"


def refusing(*arguments: Any) -> Any:
    raise RuntimeError("function not found")


@pytest.mark.parametrize(
    ("functions", "reading"),
    [
        ({EVENT: lambda device: 4, THROTTLE: refusing}, "0x4"),  # a binding and a driver of today
        ({THROTTLE: lambda device: 8}, "0x8"),  # old bindings
        ({EVENT: refusing, THROTTLE: lambda device: 8}, "0x8"),  # a new binding on an old driver
        ({EVENT: refusing, THROTTLE: refusing}, None),
        ({}, None),
    ],
)
def test_throttling_is_read_under_its_old_and_its_new_name(
    functions: dict[str, Any], reading: str | None
) -> None:
    library = SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByIndex=lambda index: "card", **functions
    )
    sampler = NvmlSampler(Dialect("pynvml"), lambda: Address(0))
    sampler.__dict__["library"] = library
    assert sampler.sample().get("throttle_reasons") == reading
