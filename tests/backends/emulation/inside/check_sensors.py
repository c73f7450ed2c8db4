"""Clocks, power and temperature: before and after a run, of the right card, and never at a run's cost."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from types import ModuleType
from typing import Any

import emulated
import pytest
from tiny_run import HEADLINE

import mla
from mla.bench import results

# backend -> (module, prefix of functions, prefix of constants)
LIBRARIES = {
    "moore": ("pymtml", "nvml", "NVML"),
    "nvidia": ("pynvml", "nvml", "NVML"),
    "metax": ("pymxsml.mxsml_extension", "mxSmlEx", "MXSMLEX"),
}
pytestmark = pytest.mark.only(*LIBRARIES)


class Nvml(ModuleType):
    """NVML as its look-alikes spell it, with a card that gets hotter."""

    def __init__(self, library: str, prefix: str, constants: str) -> None:
        super().__init__(library)
        self.asked: list[Any] = []
        functions = {
            "Init": lambda: None,
            "DeviceGetCount": lambda: 8,
            "DeviceGetHandleByIndex": self._handle,
            "DeviceGetHandleByUUID": self._handle,
            "SystemGetDriverVersion": lambda: b"535.1",
            "DeviceGetClockInfo": lambda handle, kind: {1: 1755, 2: 1593}[kind],
            "DeviceGetTemperature": self._temperature,
            "DeviceGetPowerUsage": lambda handle: 123456,
            "DeviceGetCurrentClocksEventReasons": lambda handle: 0x4,
            "Shutdown": lambda: pytest.fail("the library was shut down"),
        }
        for function, value in functions.items():
            setattr(self, prefix + function, value)
        for constant, number in {"CLOCK_SM": 1, "CLOCK_MEM": 2, "TEMPERATURE_GPU": 0}.items():
            setattr(self, f"{constants}_{constant}", number)
        self._degrees = 40

    def _handle(self, where: Any) -> str:
        self.asked.append(where)
        return f"handle of {where}"

    def _temperature(self, handle: str, sensor: int) -> int:
        self._degrees += 1
        return self._degrees


@pytest.fixture
def nvml(name: str, monkeypatch: pytest.MonkeyPatch) -> Nvml:
    library = Nvml(*LIBRARIES[name])
    if "." in library.__name__:
        monkeypatch.setitem(sys.modules, library.__name__.partition(".")[0], ModuleType("package"))
    monkeypatch.setitem(sys.modules, library.__name__, library)
    return library


def test_clocks_power_and_temperature_before_and_after(name: str, nvml: Nvml) -> None:
    backend = mla.load_backend(name, index=1)
    report = backend.environment()
    assert report["driver"] == "535.1"
    assert report["at_setup.clock_mhz"] == report["now.clock_mhz"] == "1755"
    assert report["now.memory_clock_mhz"] == "1593"
    assert (report["at_setup.temperature_c"], report["now.temperature_c"]) == ("41", "42")
    power = {"now.power_as_reported": "123456"} if name == "metax" else {"now.power_w": "123.5"}
    assert power.items() <= report.items()
    assert report["now.throttle_reasons"] == "0x4"
    uuid = dict(emulated.STATE.card.extra).get("uuid")
    assert nvml.asked == ([f"GPU-{uuid}"] if name == "nvidia" else [1])


def test_a_run_keeps_a_reading_before_and_after_its_passes(nvml: Nvml, bench: Any, tmp_path: Any) -> None:
    done = bench(*HEADLINE, "--implementations", "mla", "-o", "run.json")
    assert done.code == 0, done.err
    states = [case.device_state for case in results.decode((tmp_path / "run.json").read_bytes()).cases]
    assert [[reading["when"] for reading in state] for state in states] == [["before", "after"]] * 2
    degrees = [int(reading["temperature_c"]) for state in states for reading in state]
    assert degrees == sorted(set(degrees))


@pytest.mark.only("moore", "metax")  # NVIDIA's goes by UUID
def test_the_monitor_counts_all_devices_of_the_host(
    name: str, vendor: Any, nvml: Nvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(vendor.variable, "6,3")
    mla.load_backend(name, index=1)
    assert nvml.asked == [3]
    monkeypatch.setenv(vendor.variable, "first,second")
    report = mla.load_backend(name, index=1).environment()
    assert nvml.asked == [3]
    assert report["monitor"].startswith("none (LookupError: device 1 of 'first,second'")


@pytest.mark.only("moore")
@pytest.mark.parametrize(("says", "known"), [(768, 768e9), (0, None)])
def test_moore_learns_its_bandwidth_from_the_library(
    name: str, nvml: Nvml, monkeypatch: pytest.MonkeyPatch, says: int, known: float | None
) -> None:
    monkeypatch.setattr(nvml, "mtmlMemoryContext", lambda device: nullcontext("memory"), raising=False)
    monkeypatch.setattr(nvml, "mtmlMemoryGetBandwidth", lambda memory: says, raising=False)
    bandwidth = mla.load_backend(name).device_info().bandwidth
    assert (bandwidth.value if bandwidth else None) == known
    assert bandwidth is None or bandwidth.source == "mtmlMemoryGetBandwidth, mthreads-ml-py"


@pytest.mark.only("nvidia")
def test_without_a_uuid_only_a_single_card_is_known(
    name: str, nvml: Nvml, state: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.card = replace(state.card, extra=())
    report = mla.load_backend(name).environment()
    assert report["monitor"] == "none (LookupError: this torch does not report the UUID of the device)"
    monkeypatch.setattr(nvml, "nvmlDeviceGetCount", lambda: 1)
    assert mla.load_backend(name).environment()["now.clock_mhz"] == "1755"
    assert nvml.asked == [0]
