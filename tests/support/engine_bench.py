"""The engine's surroundings, scripted: outputs that are known, and a clock that counts instead of running."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mla.bench.measure.engine import measure
from mla.bench.measure.hooks import Hooks
from mla.bench.measure.samples import Measurement
from mla.bench.measure.variants import Variants
from mla.bench.subjects.base import Implementation
from mla.bench.subjects.inputs import Inputs, make_inputs
from mla.bench.workload.scenario import Scenario
from mla.verify.layer_check import Checker
from mla_backends.testing import HostBackend

if TYPE_CHECKING:
    from mla import MLAConfig

Log = list[tuple[str, str]]
Wrong = Callable[[int], bool]

DECODE = Scenario(name="d", mode="decode", query_lens=(1, 1), history=(2, 3), runs=3, passes=4, warmups=0)
PREFILL = Scenario(name="p", mode="prefill", query_lens=(2,), history=(0,), runs=6, passes=3, warmups=0)


class Parrot(Implementation):
    """Repeats the expected outputs, except in the passes that `wrong` picks (0 is the check)."""

    def __init__(self, name: str, expected: torch.Tensor, log: Log, wrong: Wrong = lambda number: False):
        self.name = name
        self._expected, self._log, self._wrong = expected, log, wrong
        self.number = 0  # restores so far
        self.collecting: list[bool] = []
        self.clean: list[bool] = []

    def load(self, scenario: Scenario, inputs: Inputs) -> None:
        self._log.append((self.name, "load"))
        self.outputs = torch.full(self._expected.shape, torch.nan)

    def restore(self) -> None:
        self._log.append((self.name, "restore"))
        self.number += 1

    def before(self, index: int) -> None:
        self._log.append((self.name, "before"))

    def step(self, index: int) -> None:
        self._log.append((self.name, "step"))
        self.collecting.append(gc.isenabled())
        self.clean.append(bool(self.outputs.isnan().all()))
        slot = index % len(self._expected)
        self.outputs[slot] = self._expected[slot] * (2.0 if self._wrong(self.number) else 1.0)

    def cache_bytes(self) -> int:
        return 0

    def weight_bytes(self) -> int:
        return 0


class Clock:
    """Returns 0, 1, 2, ... milliseconds; `at` maps a sample's number to what happens then."""

    clock = "virtual"

    def __init__(self, log: Log, at: dict[int, BaseException] | None = None) -> None:
        self._log, self._at = log, at or {}
        self._numbers: Iterator[int] = itertools.count()
        self.taken = 0

    def note(self, what: str) -> None:
        self._log.append(("clock", what))

    def start(self) -> None:
        self._log.append(("clock", "start"))

    def stop(self) -> float:
        number = next(self._numbers)
        self.taken = number + 1
        self._log.append(("clock", "stop"))
        if number in self._at:
            raise self._at[number]
        return float(number)


class Stage(HostBackend):
    """A backend whose timers are all one clock, so that samples number the forwards in their order."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(cache_bytes=1)
        self.clock = clock

    def synchronize(self) -> None:
        self.clock.note("wait")

    def timer(self) -> Clock:
        return self.clock

    def device_timer(self) -> Clock:
        return self.clock

    def sensors(self) -> dict[str, str]:
        self.clock.note("sense")
        return {"timed": str(self.clock.taken)}


class Bench:
    """Everything `measure` needs for one scenario."""

    def __init__(self, config: MLAConfig, scenario: Scenario) -> None:
        self.scenario = scenario
        self.inputs = make_inputs(config, scenario, 0, torch.float32)
        self.expected = torch.randn(self.inputs.hidden.shape, generator=torch.Generator().manual_seed(0))
        self.log: Log = []
        self.checker = Checker(self.expected.double(), torch.float32, lambda: self.expected)

    def parrot(self, name: str, wrong: Wrong = lambda number: False) -> Parrot:
        return Parrot(name, self.expected, self.log, wrong)

    def measure(
        self,
        *parrots: Parrot,
        seed: int = 0,
        variants: Variants | None = None,
        hooks: Hooks = Hooks(),  # noqa: B008
        **at: Any,
    ) -> dict[str, Measurement]:
        clock = Clock(self.log, {int(key[1:]): error for key, error in at.items()})
        stage = Stage(clock)
        return measure(
            parrots,
            self.scenario,
            self.inputs,
            self.checker,
            stage,
            seed,
            variants,
            lambda what, done: None,
            hooks,
        )

    def order(self) -> list[str]:
        """Name whose pass each run of timed steps belongs to, in the order they ran."""
        timed = [
            name for (name, what), last in zip(self.log[1:], self.log, strict=False) if last[1] == "start"
        ]
        assert len(timed) % self.scenario.steps == 0
        return timed[:: self.scenario.steps]


@pytest.fixture
def decode(tiny: Callable[..., MLAConfig]) -> Bench:
    return Bench(tiny(), DECODE)


@pytest.fixture
def prefill(tiny: Callable[..., MLAConfig]) -> Bench:
    return Bench(tiny(), PREFILL)
