"""Passes during which others had the CPUs are marked, whatever they took."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mla.bench.doubts import clock
from mla.bench.measure.passes import PassRunner
from mla.bench.measure.variants import Steps


class Forwards:
    """Do nothing but what `during` does in a step."""

    def __init__(self, during: Callable[[], None]) -> None:
        self._during = during
        self.setting = SimpleNamespace(device=torch.device("cpu"))

    def step(self, index: int) -> None:
        self._during()

    def idle(self) -> AbstractContextManager[None]:
        return nullcontext()

    def slowest(self, samples: list[float]) -> list[float]:
        return samples

    def __getattr__(self, name: str) -> Any:
        return lambda *numbers: None


@pytest.mark.parametrize(("counts", "disturbed"), [(True, True), (False, False)])
@pytest.mark.parametrize("forwards", [1, 3])
def test_a_pass_that_waited_for_a_cpu_is_disturbed(
    monkeypatch: pytest.MonkeyPatch, counts: bool, disturbed: bool, forwards: int
) -> None:
    """Where the system does not count such waiting, none is."""
    waited = [0]

    def wait() -> None:
        waited[0] += 1_000_000_000

    monkeypatch.setattr(clock, "delayed_ns", lambda: waited[0] if counts else None)
    one, steps = Forwards(wait), Steps(range(forwards), range(forwards), 1)
    runner = PassRunner(one, one, lambda: None, None, None, steps, SimpleNamespace())  # type: ignore[arg-type]
    assert runner.run(1, lambda: None).disturbed is disturbed
    assert not runner.idle(2, lambda: None).disturbed, "it made no forward"
