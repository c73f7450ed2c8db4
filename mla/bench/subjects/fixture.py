"""What a scenario measures: the layer, or one op of it, behind one interface for `session`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from mla.bench import results
from mla.bench.subjects.base import Implementation
from mla.bench.subjects.inputs import expected_outputs, make_inputs
from mla.bench.subjects.memory import forward_cost
from mla.bench.subjects.op.implementation import OpImplementation, reference_results
from mla.bench.subjects.op.problem import op_problem
from mla.bench.subjects.setting import Setting
from mla.bench.workload.grid import Point
from mla.bench.workload.op_scenario import OpScenario
from mla.verify.layer_check import Checker
from mla.verify.layer_oracle import State
from mla.verify.op_check import OpChecker
from mla.weights import random_state_dict

Builders = Mapping[str, Callable[[Setting, State], Implementation]]


class Subject(ABC):
    """Inputs, oracle, implementations and work of one scenario, shared by all implementations.

    Making one is cheap: `cost` counts from lengths alone, and the rest draws and computes at first use.
    """

    op: str | None = None  # the role that is measured; None is the layer

    def __init__(self, setting: Setting, scenario: Point) -> None:
        """`setting`: that of the scenario, with its own heads, dtype and layers."""
        self.setting = setting
        self.scenario = scenario
        self._prepared: tuple[Any, Any] | None = None

    @property
    def prepared(self) -> bool:
        """Say whether anything large was made."""
        return self._prepared is not None

    def prepare(self) -> tuple[Any, Any]:
        """Return what `Implementation.load` and `Implementation.check` take, made once."""
        if self._prepared is None:
            self._prepared = self._prepare()
        return self._prepared

    @abstractmethod
    def _prepare(self) -> tuple[Any, Any]: ...

    @abstractmethod
    def build(self, name: str) -> Implementation:
        """Return an implementation by name; `prepare` has been called."""

    @abstractmethod
    def cost(self) -> results.Cost:
        """Return the work of one forward."""


class LayerSubject(Subject):
    """The whole layer, on random weights or those of a checkpoint (`state`)."""

    def __init__(
        self,
        setting: Setting,
        scenario: Point,
        state: State | None,
        builders: Builders,
        beat: Callable[[], None],
    ) -> None:
        super().__init__(setting, scenario)
        self._builders, self._given, self._beat = builders, state, beat
        self._state: State = {}

    def _prepare(self) -> tuple[Any, Any]:
        config, dtype = self.setting.config, self.setting.dtype
        self._state = self._weights()
        inputs = make_inputs(config, self.scenario, self.setting.seed, dtype)
        expected = expected_outputs(config, self._state, self.scenario, inputs)
        return inputs, Checker(expected, dtype, self._reference_outputs)

    def _weights(self) -> State:
        if self._given is None:
            return random_state_dict(self.setting.config, self.setting.seed, self.setting.dtype)
        return {name: weight.to(self.setting.dtype) for name, weight in self._given.items()}

    def _reference_outputs(self) -> torch.Tensor:
        """Run the reference once: the yardstick of our own implementations."""
        inputs, _ = self.prepare()
        reference = self._builders["mla-reference"](replace(self.setting, layers=1), self._state)
        reference.load(self.scenario, inputs)
        for index in range(self.scenario.inputs):
            reference.step(index)
            self._beat()
        return reference.outputs

    def build(self, name: str) -> Implementation:
        return self._builders[name](self.setting, self._state)

    def cost(self) -> results.Cost:
        return forward_cost(self.setting, self.scenario, range(self.scenario.inputs))


class OpSubject(Subject):
    """One op of the layer alone."""

    def __init__(self, setting: Setting, scenario: OpScenario) -> None:
        super().__init__(setting, scenario)
        self.op = scenario.role
        self._problem = op_problem(setting, scenario)

    def _prepare(self) -> tuple[Any, Any]:
        problem, setting = self._problem, self.setting
        problem.draw()
        return problem, OpChecker(problem.truth, setting.dtype, lambda: reference_results(problem, setting))

    def build(self, name: str) -> Implementation:
        policy = "reference" if name == "mla-reference" else self.setting.ops
        return OpImplementation(self.setting, self._problem, name, policy)

    def cost(self) -> results.Cost:
        return results.Cost(**self._problem.work._asdict())
