"""The engine's surroundings, scripted: outputs that are known, and a clock that only steps advance."""

from __future__ import annotations

import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mla.bench.measure import evidence, passes
from mla.bench.measure.engine import CHECKED, Hooks, measure
from mla.bench.measure.samples import Measurement
from mla.bench.measure.variants import Variants
from mla.bench.subjects.base import Facts, Implementation, Outputs
from mla.bench.subjects.inputs import Inputs, make_inputs
from mla.bench.workload.scenario import Scenario
from mla.verify.layer_check import Checker, Forward
from mla.verify.verdict import Check
from mla_backends.testing import HostBackend

if TYPE_CHECKING:
    from mla import MLAConfig

__all__ = ["CHECKED", "DECODE", "PREFILL", "Bench", "MakeBench", "Parrot", "Wrong"]

Log = list[tuple[str, str]]
Wrong = Callable[[int], bool]

SETTING: Any = SimpleNamespace(ranks=None, device=torch.device("cpu"))
DECODE = Scenario(name="d", mode="decode", query_lens=(1, 1), history=(2, 3), runs=3, passes=4, warmups=0)
PREFILL = Scenario(name="p", mode="prefill", query_lens=(2,), history=(0,), runs=6, passes=3, warmups=0)


class Parrot(Implementation):
    """Repeats the expected outputs, except in the passes that `wrong` picks by how many ran before."""

    def __init__(self, bench: Bench, name: str, wrong: Wrong = lambda number: False):
        self.setting = SETTING
        self.name = name
        self._bench, self._wrong = bench, wrong
        self.number = -1  # of the pass: 0 is the check
        self.numbers: list[int] = []  # by which inputs were selected
        self.collecting: list[bool] = []
        self._found: dict[int, torch.Tensor] = {}

    def _note(self, what: str) -> None:
        self._bench.log.append((self.name, what))

    def load(self, scenario: Scenario, inputs: Inputs) -> None:
        self._note("load")

    def restore(self, number: int = 0) -> None:
        self._note("restore")
        self.number += 1
        self.numbers.append(number)
        self._found = {}

    def before(self, index: int) -> None:
        self._note("before")

    def step(self, index: int) -> None:
        self._note("step")
        self.collecting.append(gc.isenabled())
        self._bench.time.step()
        expected = self._bench.expected[index % len(self._bench.expected)]
        self._found[index] = expected * (2.0 if self._wrong(self.number) else 1.0)

    def after(self, index: int) -> None:
        self._note("after")

    def outputs(self) -> Outputs:
        self._note("outputs")
        return self._found

    def facts(self) -> Facts:
        return Facts()

    def check(self, checker: Checker) -> Check:
        steps = len(self._bench.expected)
        forwards = [
            Forward(index % steps, rows, checker.expected[index % steps], f"step {index}")
            for index, rows in self._found.items()
        ]
        return checker.check_forwards(forwards, False)


class Time:
    """A clock that steps advance: the first by 1 ms, the next by 2, and so on."""

    def __init__(self, log: Log, at: dict[int, BaseException]) -> None:
        self._log, self._at = log, at
        self.now = 1_000_000
        self.steps = 0
        self.passes = 0  # timed ones so far

    def step(self) -> None:
        if self.steps in self._at:
            raise self._at[self.steps]
        self.steps += 1
        self.now += self.steps * 1_000_000

    def read(self) -> int:
        self._log.append(("clock", "read"))
        return self.now


class DeviceClock:
    """A device's clock that agrees with the host's."""

    clock = "virtual"

    def __init__(self, time: Time) -> None:
        self._time, self._start = time, 0

    def start(self) -> None:
        self._start = self._time.now

    def stop(self) -> float:
        return (self._time.now - self._start) / 1e6


class Stage(HostBackend):
    """A backend that notes its calls."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(cache_bytes=64 << 20)
        self._bench = bench

    def synchronize(self) -> None:
        self._bench.log.append(("clock", "wait"))

    def device_timer(self) -> DeviceClock:
        return DeviceClock(self._bench.time)

    def sensors(self) -> dict[str, str]:
        self._bench.log.append(("clock", "sense"))
        return {"timed": str(self._bench.time.passes)}


class Bench:
    """Everything `measure` needs for one scenario."""

    def __init__(self, config: MLAConfig, scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scenario = scenario
        self.inputs = make_inputs(config, scenario, 0, torch.float32)
        self.expected = torch.randn(self.inputs.hidden.shape, generator=torch.Generator().manual_seed(0))
        self.log: Log = []
        self.time = Time(self.log, {})
        self.checker = Checker(self.expected.double(), torch.float32, lambda: self.expected)
        for module in (passes, evidence):
            monkeypatch.setattr(module, "now_ns", lambda: self.time.read())
        timed = passes.PassRunner.time

        def noted(runner: passes.PassRunner, *arguments: Any) -> None:
            self.log.append((runner.implementation.name, "pass"))
            timed(runner, *arguments)
            self.log.append((runner.implementation.name, "passed"))
            self.time.passes += 1

        monkeypatch.setattr(passes.PassRunner, "time", noted)

    def parrot(self, name: str, wrong: Wrong = lambda number: False) -> Parrot:
        return Parrot(self, name, wrong)

    def measure(
        self,
        *parrots: Parrot,
        seed: int = 0,
        variants: Variants | None = None,
        hooks: Hooks = Hooks(),  # noqa: B008
        **at: Any,
    ) -> dict[str, Measurement]:
        """Measure; `_16=error` raises in the step that 16 others preceded."""
        self.time = Time(self.log, {int(key[1:]): error for key, error in at.items()})
        quiet = lambda what, done: None  # noqa: E731
        arguments = (self.scenario, self.inputs, self.checker, Stage(self), seed, variants, quiet, hooks)
        return measure(parrots, *arguments)

    def order(self) -> list[str]:
        """Name whose pass was timed, in the order they ran."""
        return [name for name, what in self.log if what == "passed"]

    def timed(self) -> list[list[str]]:
        """Return the words of every timed pass that was finished."""
        words, passes = [what for _, what in self.log], []
        starts = [place for place, what in enumerate(words) if what == "pass"]
        for start in starts:
            if "passed" in words[start:]:
                passes.append(words[start + 1 : words.index("passed", start)])
        return passes


MakeBench = Callable[[Scenario], Bench]


@pytest.fixture
def make_bench(tiny: Callable[..., MLAConfig], monkeypatch: pytest.MonkeyPatch) -> MakeBench:
    return lambda scenario: Bench(tiny(), scenario, monkeypatch)


@pytest.fixture
def decode(make_bench: MakeBench) -> Bench:
    return make_bench(DECODE)


@pytest.fixture
def prefill(make_bench: MakeBench) -> Bench:
    return make_bench(PREFILL)
