"""Wrong devices: check -> makers of backends that it must fail, each from the class of a right one."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mla.reference import REFERENCE
from mla_backends import Availability
from mla_backends.api import DeviceInfo, HostTimer, MemoryInfo, Peak

Latent = type(REFERENCE["latent_attention"])


class Scaled:
    """A timer whose result is off."""

    clock = "host"

    def __init__(self, inner: HostTimer, change: Callable[[float], float]) -> None:
        self._inner, self._change = inner, change

    def start(self) -> None:
        self._inner.start()

    def stop(self) -> float:
        return self._change(self._inner.stop())


class StartsLate(HostTimer):
    """Does not wait for what was submitted before it starts."""

    def start(self) -> None:
        self._start = time.perf_counter_ns()


CALLS = itertools.count()


def misspelt() -> Any:
    class Misspelt(Latent):  # type: ignore[misc, valid-type]
        contract = "latent_atention/1"

    return {"mine": Misspelt()}


def answering(query: str, answer: Any) -> Any:
    """Return an op whose support query gives `answer`."""
    mutant = type("Odd", (Latent,), {query: lambda self, *rest: answer})
    return {"mine": mutant()}


def saying(remarks: Any) -> Any:
    """Return an op that says this of itself."""
    return {"mine": type("Odd", (Latent,), {"remarks": remarks})()}


def replaces(name: str, value: Any) -> Callable[[type], Any]:
    """Return a maker of a backend with a method that returns `value`, or raises it."""

    def method(self: Any, *rest: Any) -> Any:
        if isinstance(value, Exception):
            raise value
        return value(self) if callable(value) else value

    return lambda sound: type("Mutant", (sound,), {name: method})()


def slow(_: Any) -> Availability:
    time.sleep(0.06)
    return Availability(True)


def spawning(_: Any) -> Availability:
    subprocess.run([sys.executable, "-c", ""], check=True)
    return Availability(True)


def forking(_: Any) -> Availability:
    return Availability(os.system("true") == 0)


def lax(sound: type) -> Any:
    return type("Lax", (sound,), {"known_options": classmethod(lambda cls: ("threads", "no_such_option"))})()


def indexed(sound: type) -> Any:
    return type("Indexed", (sound,), {"setup": lambda self, index=None: torch.device("cpu", 0)})()


def waiting(self: Any) -> HostTimer:
    return HostTimer(self.synchronize)


# check -> makers of backends that it must fail
MUTANTS: Mapping[str, list[Callable[[type], Any]]] = {
    "device.identity": [
        lambda sound: type("Old", (sound,), {"api_version": 0})(),
        lambda sound: type("Nameless", (sound,), {"name": ""})(),
    ],
    "device.probe": [
        replaces("probe", Availability(False, "it is switched off")),
        replaces("probe", RuntimeError("no driver")),
        replaces("probe", Availability(True, evidence={"devices": 2})),
    ],  # type: ignore[dict-item]
    "device.probe_speed": [replaces("probe", slow)],
    "device.probe_process": [replaces("probe", spawning), replaces("probe", forking)],
    "device.setup": [indexed],
    "device.options": [lax],
    "device.count": [
        replaces("device_count", 0),
        replaces("device_count", 1.0),
        replaces("device_count", RuntimeError("no driver")),
    ],
    "device.info": [
        replaces("device_info", DeviceInfo("card", memory_bytes=0)),
        replaces("device_info", DeviceInfo(" ")),
        replaces("device_info", DeviceInfo("card", bandwidth=Peak(1e12, ""))),
        replaces("device_info", DeviceInfo("card", flops={"bfloat16": Peak(0, "a sheet")})),
    ],
    "device.environment": [
        replaces("environment", OSError("no such library")),
        replaces("environment", {"driver": None}),
    ],
    "device.memory": [
        replaces("memory", MemoryInfo(free=2, total=1)),
        replaces("memory", MemoryInfo(total=0)),
        replaces("memory", MemoryInfo(allocated=5, peak=4)),
        replaces("memory", MemoryInfo(free=0.5)),
    ],  # type: ignore[arg-type]
    "device.memory_grows": [
        replaces("memory", MemoryInfo(allocated=1 << 20)),
        replaces("empty_cache", RuntimeError("not implemented")),
    ],
    "device.dtype": [replaces("dtypes", (torch.float32, torch.float8_e4m3fn))],
    "device.dtypes": [
        replaces("dtypes", ()),
        replaces("dtypes", ("float32",)),
        replaces("dtypes", OSError("?")),
    ],
    "device.synchronize": [replaces("synchronize", None)],
    "device.timer": [
        replaces("timer", lambda self: Scaled(waiting(self), lambda ms: ms * 1e3)),
        replaces("timer", lambda self: Scaled(waiting(self), lambda ms: ms / 1e3)),
        replaces("timer", lambda self: HostTimer(lambda: None)),
    ],
    "device.timer_scales": [
        replaces("timer", lambda self: Scaled(waiting(self), lambda ms: 5.0)),
        replaces("timer", lambda self: Scaled(waiting(self), lambda ms: 0.0)),
    ],
    "device.timer_start": [
        replaces("timer", lambda self: StartsLate(self.synchronize)),
        replaces("timer", lambda self: (StartsLate if next(CALLS) % 5 else HostTimer)(self.synchronize)),
    ],
    "device.graph": [replaces("graph", lambda self: lambda: None)],
    "ops.known": [
        replaces("ops", misspelt()),
        replaces("ops", {"reference": Latent()}),
        replaces("ops", [Latent()]),
        replaces("ops", {"mine": Latent(("fp8_dsmla",))}),
    ],
    "ops.reasons": [
        replaces("ops", answering("unsupported_reasons", None)),
        replaces("ops", answering("unsupported_reasons", "no bf16")),
    ],
    "ops.preflight": [
        replaces("ops", answering("preflight", None)),
        replaces("ops", answering("preflight", "no nvcc")),
        replaces("ops", saying("a smaller tile")),
        replaces("ops", saying(None)),
    ],
    "ops.batch_reasons": [replaces("ops", answering("unsupported_batch", False))],
}
