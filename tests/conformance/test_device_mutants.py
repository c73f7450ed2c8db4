"""Devices so wrong that a run might end: the suite judges them to the end.

That each wrong device, and each wrong layer, is found by its check is in `tests/frozen/test_wrong.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mla.conformance.report import CheckResult
from mla.layer.forward import Step
from mla.reference import REFERENCE
from mla_backends.errors import BackendError

Run = Callable[..., list[CheckResult]]


def unscaled(step: Step, right: Callable[..., Any], ops: Any, hidden: Any, *rest: Any) -> Any:
    """Weights carry no factor: what is selected stays the same."""
    selection = right(step, ops, hidden, *rest)
    step.views.indexed(len(hidden)).weights.div_(step.config.index_scale)
    return selection


def only_where_read(step: Step, right: Callable[..., Any], *given: Any) -> None:
    """Keys are written in steps that select, and in no others."""
    plan = given[3]
    if plan.absorbed is not None and plan.absorbed.is_sparse:
        right(step, *given)


def in_the_other_layout(step: Step, right: Callable[..., Any], *given: Any) -> None:
    pairs = not step.config.indexer_rope_interleave
    right(replace(step, config=replace(step.config, indexer_rope_interleave=pairs)), *given)


@pytest.mark.parametrize(
    ("check", "method", "wrong", "reason"),
    [
        ("layer.indexer", "select", unscaled, "rows of its index weights are wrong"),
        (
            "layer.update",
            "write_index_keys",
            only_where_read,
            "rows of its index keys of request 0 are wrong",
        ),
        (
            "layer.indexer",
            "write_index_keys",
            in_the_other_layout,
            "rows of its index keys of request 0 are wrong",
        ),
    ],
)
def test_a_layer_that_indexes_wrong_is_found(
    judge: Run, sound: Any, monkeypatch: pytest.MonkeyPatch, check: str, method: str, wrong: Any, reason: str
) -> None:
    right = getattr(Step, method)
    monkeypatch.setattr(Step, method, lambda step, *given: wrong(step, right, *given))
    (result,) = judge(sound(), check)
    assert result.status == "fail"
    assert reason in result.reason


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


class Asked(type(REFERENCE["rms_norm"])):  # type: ignore[misc]
    def unsupported_reasons(self, spec: Any) -> list[str]:
        raise BackendError("not here")


def test_a_support_query_that_raises_is_no_refusal(judge: Run, sound: Any) -> None:
    (result,) = judge(sound(ops={"mine": Asked()}), "ops.reasons")
    assert (result.status, result.cases.failed) == ("fail", 1)
