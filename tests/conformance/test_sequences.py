"""Backends that make a forward's calls in one: a right one passes, one that remembers fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from mla.conformance.report import CheckResult
from mla_backends import Backend
from mla_backends.api import OpCall

Run = Callable[..., list[CheckResult]]
HIDDEN, PAGES, OUT = range(3)  # of what moves


@pytest.fixture(params=[[], [HIDDEN], [PAGES], [OUT]], ids=["nothing", "hidden", "pages", "out"])
def remembering(request: pytest.FixtureRequest, sound: Any) -> tuple[Backend, list[int]]:
    """Return a backend whose sequences remember one of the tensors that move, and how often they ran."""
    ran: list[int] = []

    class Remembering(sound):
        def sequence(
            self, calls: Sequence[OpCall], moving: Sequence[torch.Tensor]
        ) -> Callable[..., None] | None:
            def run(*moved: torch.Tensor) -> None:
                ran.append(len(calls))
                given = [
                    old if place in request.param else new
                    for place, (old, new) in enumerate(zip(moving, moved, strict=True))
                ]
                for call in calls:
                    call.op(
                        *call.arguments, **{k: replaced(v, moving, given) for k, v in call.tensors.items()}
                    )

            return run

    return Remembering(), ran


def replaced(value: Any, moving: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> Any:
    return next((new for old, new in zip(moving, given, strict=True) if value is old), value)


def test_a_sequence_must_not_remember(
    judge: Run, remembering: tuple[Backend, list[int]], request: pytest.FixtureRequest
) -> None:
    backend, ran = remembering
    results = judge(backend, "layer.shared_plan")
    failed = {result.check for result in results if result.status == "fail"}
    assert ran, "the suite has seen no sequence"
    if "nothing" in request.node.callspec.id:
        assert not failed
    else:
        assert "layer.shared_plan" in failed
