"""One op of the contract alone, as an implementation that can be timed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch

from mla.bench.subjects.base import Implementation
from mla.bench.subjects.op.call import CALLS, Placement
from mla.bench.subjects.op.problem import OpProblem
from mla.bench.subjects.setting import Setting, make_ops
from mla.bench.workload.scenario import Scenario
from mla.layer.ops import Choice
from mla.reference import REFERENCE
from mla.verify.op_check import OpChecker, Tensors
from mla.verify.verdict import Check


class OpImplementation(Implementation):
    """The op that a layer of this setting would choose for a role."""

    def __init__(self, setting: Setting, problem: OpProblem, name: str) -> None:
        super().__init__(setting)
        self.name = name
        self._problem = problem
        self._choice = make_ops(setting, problem.role)[problem.role]

    def load(self, scenario: Scenario, inputs: Any) -> None:
        """Lay the operands out on the device. Raises `UnsupportedBatch` if the op refuses the shape."""
        problem, setting = self._problem, self.setting
        check_lengths(problem.kind, self._choice, scenario, setting.page_size)
        placement = Placement(setting.device, setting.page_size, setting.seed)
        self._call = CALLS[problem.kind](problem, self._choice, placement)
        self.restore()
        self._keep_outputs()

    def restore(self, number: int = 0) -> None:
        """Plan the batch again and clear all results."""
        start = time.perf_counter_ns()
        if self._call.prepare():
            self.plan_ms = (time.perf_counter_ns() - start) / 1e6
        self._call.clear()

    def step(self, index: int) -> None:
        self._call.run()

    def check(self, checker: OpChecker) -> Check:
        """Check everything the op wrote, including log-sum-exps and the cache."""
        self._keep_outputs()
        return checker.check(self._call.found(), self._call.damage())

    def collect(self) -> None:
        self._keep_outputs()

    def compared(self) -> dict[int, torch.Tensor]:
        return {0: self.outputs.cpu()}

    def _keep_outputs(self) -> None:
        """Join the results into one tensor [1, T, ..], to compare implementations."""
        found = [result for name, result in self._call.found().items() if name != "lse"]
        self.outputs = (found[0] if len(found) == 1 else torch.cat(found, dim=-1))[None]

    def cache_bytes(self) -> int:
        return self._call.cache_bytes

    def weight_bytes(self) -> int:
        return self._call.weight_bytes

    def replace_ops(self, replace: Callable[[str, Any], Any]) -> None:
        self._choice = dataclasses.replace(self._choice, op=replace(self._problem.role, self._choice.op))

    def ops(self) -> dict[str, str]:
        return {self._problem.role: self._choice.name}


def check_lengths(kind: str, choice: Choice, scenario: Scenario, page_size: int) -> None:
    """Raise `UnsupportedBatch` if the op refuses the scenario's lengths."""
    if kind.endswith("attention"):
        pages = page_size if kind == "latent_attention" else None
        choice.check_batch(scenario.query_lens, scenario.kv_lens(0), pages)


def reference_results(problem: OpProblem, setting: Setting) -> Tensors:
    """Return the reference's results on the host, whose error bounds that of a fused op."""
    host = torch.device("cpu")
    choice = Choice("reference", REFERENCE[problem.kind], dataclasses.replace(problem.spec, device=host))
    call = CALLS[problem.kind](problem, choice, Placement(host, setting.page_size, setting.seed))
    call.prepare()
    call.run()
    return call.found()
