"""Deliberately wrong devices: the check that is there for a fault must fail, whatever the others say."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from mla.conformance.registry import all_checks
from mla.conformance.report import CheckResult
from mla.reference import REFERENCE
from mla_backends import Availability
from mla_backends.api import DeviceInfo, HostTimer, MemoryInfo, Peak

Run = Callable[..., list[CheckResult]]
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
    backend = sound()
    backend.device = torch.device("cpu", 0)
    return backend


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
        replaces("timer", lambda self: Scaled(waiting(self), lambda found: found * 1e3)),
        replaces("timer", lambda self: Scaled(waiting(self), lambda found: found / 1e3)),
        replaces("timer", lambda self: HostTimer(lambda: None)),
    ],
    "device.timer_scales": [
        replaces("timer", lambda self: Scaled(waiting(self), lambda found: 5.0)),
        replaces("timer", lambda self: Scaled(waiting(self), lambda found: 0.0)),
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
CASES = [(name, number) for name, makers in MUTANTS.items() for number in range(len(makers))]


def test_every_check_of_the_device_has_a_mutant() -> None:
    assert set(MUTANTS) == {one.id for one in all_checks() if one.id.startswith(("device.", "ops."))}


@pytest.mark.parametrize(("check", "number"), CASES)
def test_the_check_fails_a_wrong_device(
    judge: Run, sound: type, request: pytest.FixtureRequest, check: str, number: int
) -> None:
    backend = MUTANTS[check][number](sound)
    if "synchronize" in check or "timer" in check:
        request.getfixturevalue("asynchronous")
    results = judge(backend, check)
    assert "fail" in {one.status for one in results}
    assert all(one.reason for one in results if one.status == "fail")


def test_a_backend_that_is_not_set_up_fails_instead_of_ending_the_run(judge: Run, sound: type) -> None:
    backend = sound()
    backend.device = None
    (setup,) = judge(backend, "device.setup")
    assert setup.status == "fail"
    assert "is not set up" in setup.reason


def test_a_driver_that_ends_the_process_politely_does_not_end_the_run(judge: Run, sound: type) -> None:
    def leave(self: Any) -> Any:
        sys.exit(0)

    (probe,) = judge(type("Leaving", (sound,), {"probe": leave})(), "device.probe")
    assert (probe.status, probe.reason.partition(" (")[0]) == ("fail", "raised SystemExit: 0")


def test_a_backend_whose_every_method_raises_is_judged_to_the_end(judge: Run, sound: type) -> None:
    def fails(self: Any, *rest: Any) -> Any:
        raise RuntimeError("the driver is gone")

    names = (
        "probe",
        "device_info",
        "dtypes",
        "timer",
        "graph",
        "memory",
        "environment",
        "ops",
        "synchronize",
    )
    broken = type("Broken", (sound,), dict.fromkeys(names, fails))()
    results = {one.check: one for one in judge(broken, "device", "ops")}
    assert "raised RuntimeError: the driver is gone" in results["device.probe"].reason
    assert results["ops.known"].status == results["device.synchronize"].status == "fail"
