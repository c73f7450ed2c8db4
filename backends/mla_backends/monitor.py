"""Clocks, power and temperature of a device, for the result file; reading them can never break a run.

A library may raise, and a driver may hang: `Monitor` asks it in a separate thread, for a bounded time, and
turns every failure into one line of text.

`NvmlSampler` reads management libraries that have NVML's functions, under NVML's or their own names.
NVIDIA's is `pynvml` (distribution nvidia-ml-py); other vendors ship look-alikes. None is required, and none
is ever shut down: other code in the process may use it, and one vendor's cannot be started twice.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from mla_backends.errors import describe

TIMEOUT_S = 3.0  # that a management library may take to answer


class Monitor:
    """A sampler that cannot break a run. After the first failure it is never asked again.

    A sampler's `facts()` do not change: the driver's version. `sample()` has clocks, power and temperature,
    with units in their names. Both may raise anything.
    """

    def __init__(self, sampler: Any, timeout_s: float = TIMEOUT_S) -> None:
        self._sampler = sampler
        self._timeout_s = timeout_s
        self._problem = ""
        self._facts: dict[str, str] | None = None

    def facts(self) -> dict[str, str]:
        """Return what does not change, or why it is unknown, as {"monitor": reason}."""
        if self._facts is None:
            self._facts = self._ask(self._sampler.facts)
        return {**self._facts, **({"monitor": f"none ({self._problem})"} if self._problem else {})}

    def sample(self) -> dict[str, str]:
        """Return what changes; empty if the library reports nothing."""
        return self._ask(self._sampler.sample)

    def _ask(self, question: Callable[[], Mapping[str, str]]) -> dict[str, str]:
        if self._problem:
            return {}
        answers: list[Mapping[str, str]] = []
        problems: list[str] = []

        def work() -> None:
            try:
                answers.append({str(key): str(value) for key, value in question().items()})
            except BaseException as error:  # noqa: BLE001  # a library's SystemExit must not end the thread's run
                problems.append(describe(error))

        # A daemon, because a call into a hanging driver cannot be stopped.
        thread = threading.Thread(target=work, name="mla-monitor", daemon=True)
        thread.start()
        thread.join(self._timeout_s)
        if not answers:
            self._problem = problems[0] if problems else f"no answer within {self._timeout_s:g} s"
            return {}
        return dict(answers[0])


# Reading -> the function of NVML that gives it, and the constant that says which.
READINGS = {
    "clock_mhz": ("DeviceGetClockInfo", "CLOCK_SM"),
    "memory_clock_mhz": ("DeviceGetClockInfo", "CLOCK_MEM"),
    "temperature_c": ("DeviceGetTemperature", "TEMPERATURE_GPU"),
}
# One function, under the name NVML has given it since CUDA 12 and under the one before.
THROTTLE_REASONS = ("DeviceGetCurrentClocksEventReasons", "DeviceGetCurrentClocksThrottleReasons")


@dataclass(frozen=True)
class Address:
    """Where torch says the device is, for finding it in a library that counts differently."""

    index: int  # among the devices this process sees
    visible: str | None = None  # the variable that chose them: physical indices or names
    uuid: str | None = None  # without a prefix

    def physical_index(self) -> int:
        """Return the index among all devices of the host. Raises LookupError if that would be a guess."""
        if self.visible is None:
            return self.index
        chosen = [word.strip() for word in self.visible.split(",")]
        if self.index >= len(chosen) or not chosen[self.index].isdecimal():
            raise LookupError(f"device {self.index} of '{self.visible}' has no known physical index")
        return int(chosen[self.index])


@dataclass(frozen=True)
class Dialect:
    """How a library spells NVML's names."""

    module: str  # "pynvml"
    prefix: str = "nvml"  # of functions
    constants: str = "NVML"  # of constants
    by_uuid: bool = False  # torch knows the device's UUID, and the library takes it
    milliwatts: bool = True  # the unit of power is known


class NvmlSampler:
    """Reads one device. `locate` is called on the first reading, when the device is set up."""

    def __init__(self, dialect: Dialect, locate: Callable[[], Address]) -> None:
        self.dialect = dialect
        self._locate = locate

    def facts(self) -> Mapping[str, str]:
        self.device  # noqa: B018  # raises what is wrong
        with suppress(Exception):
            said = self.call("SystemGetDriverVersion")
            return {"driver": said.decode(errors="replace") if isinstance(said, bytes) else str(said)}
        return {}

    def sample(self) -> Mapping[str, str]:
        device, sample = self.device, {}
        for name, (function, constant) in READINGS.items():
            with suppress(Exception):  # any of them may be unsupported on a card
                which = getattr(self.library, f"{self.dialect.constants}_{constant}")
                sample[name] = str(self.call(function, device, which))
        with suppress(Exception):
            power = self.call("DeviceGetPowerUsage", device)
            known = {"power_w": f"{power / 1e3:.1f}"} if self.dialect.milliwatts else None
            sample |= known or {"power_as_reported": str(power)}
        for function in THROTTLE_REASONS:
            with suppress(Exception):
                sample["throttle_reasons"] = hex(self.call(function, device))
                break
        return sample

    @functools.cached_property
    def library(self) -> ModuleType:
        """The library's module. Raises ImportError."""
        return importlib.import_module(self.dialect.module)

    @functools.cached_property
    def device(self) -> Any:
        """The library's handle of the device. Raises whatever the library does, or LookupError."""
        self.call("Init")
        address = self._locate()
        if not self.dialect.by_uuid:
            return self.call("DeviceGetHandleByIndex", address.physical_index())
        if address.uuid:
            return self.call("DeviceGetHandleByUUID", f"GPU-{address.uuid}")
        if self.call("DeviceGetCount") != 1:  # torch and the library may count in different orders
            raise LookupError("this torch does not report the UUID of the device")
        return self.call("DeviceGetHandleByIndex", 0)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the library by its name without prefix."""
        return getattr(self.library, self.dialect.prefix + name)(*arguments)
