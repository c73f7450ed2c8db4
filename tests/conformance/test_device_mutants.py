"""Devices so wrong that a run might end: the suite judges them to the end.

That each wrong device, and each wrong layer, is found by its check is in `tests/frozen/test_wrong.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from wrong_devices import MUTANTS
from wrong_ops import of_layers

from mla.conformance.registry import all_checks
from mla.conformance.report import CheckResult

Run = Callable[..., list[CheckResult]]


def test_every_check_of_the_device_has_a_mutant() -> None:
    assert set(MUTANTS) == {check.id for check in all_checks() if check.id.startswith(("device.", "ops."))}


def test_every_check_of_the_layer_has_a_mutant() -> None:
    assert set(of_layers.MUTANTS) == {check.id for check in all_checks() if check.id.startswith("layer.")}


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
    results = {verdict.check: verdict for verdict in judge(broken, "device", "ops")}
    assert "raised RuntimeError: the driver is gone" in results["device.probe"].reason
    assert results["ops.known"].status == results["device.synchronize"].status == "fail"
