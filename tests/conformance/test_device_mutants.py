"""Deliberately wrong devices: the check that is there for a fault must fail, whatever the others say."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
from wrong_devices import MUTANTS

from mla.conformance.registry import all_checks
from mla.conformance.report import CheckResult

Run = Callable[..., list[CheckResult]]
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
