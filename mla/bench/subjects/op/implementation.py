"""One op of the contract alone, as an implementation that can be timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from mla.bench.subjects.base import Implementation
from mla.bench.subjects.op.attention_call import ExpandedCall, LatentCall, WriteCall
from mla.bench.subjects.op.call import BoundCall, LinearCall, NormCall, Placement, RotateCall
from mla.bench.subjects.op.changes import ChangedTruth, change, covering
from mla.bench.subjects.op.problem import OpProblem
from mla.bench.subjects.op.verdicts import summary
from mla.bench.subjects.setting import Setting, make_ops
from mla.bench.workload.scenario import Scenario
from mla.command.clock import now_ns
from mla.layer.ops import Choice
from mla.reference import REFERENCE
from mla.verify.op_check import OpChecker, Tensors
from mla.verify.verdict import Check

CALLS: dict[str, type[BoundCall]] = {
    "linear": LinearCall,
    "batched_linear": LinearCall,
    "rms_norm": NormCall,
    "rotate_query": RotateCall,
    "write_latent": WriteCall,
    "latent_attention": LatentCall,
    "expanded_attention": ExpandedCall,
}


class OpImplementation(Implementation):
    """The op that a layer of this setting would choose for a role."""

    def __init__(self, setting: Setting, problem: OpProblem, name: str) -> None:
        super().__init__(setting)
        self.name = name
        self._problem = problem
        self._ops = make_ops(setting, problem.role)
        self._choice = self._ops[problem.role]

    def load(self, scenario: Scenario, inputs: Any) -> None:
        """Lay the operands out on the device. Raises `UnsupportedBatch` if the op refuses the shape."""
        problem, setting = self._problem, self.setting
        check_lengths(problem.kind, self._choice, scenario, setting.page_size)
        placement = Placement(setting.device, setting.page_size, setting.seed, scenario.steps)
        self._call = CALLS[problem.kind](problem, self._choice, placement)
        self.restore()

    def restore(self, number: int = 0) -> None:
        """Plan the batch again, and begin pass `number`."""
        start = now_ns()
        if self._call.prepare():
            self.plan_ms = (now_ns() - start) / 1e6
        self._call.restore(number)
        self._number = number
        self._kept: dict[int, Tensors] = {}  # index of a call -> its results on the host

    def ready(self, index: int) -> None:
        self._call.before(index)

    def step(self, index: int) -> None:
        self._call.run()

    def after(self, index: int) -> None:
        self._call.after(index)

    def collect(self) -> None:
        self._kept = self._call.collect()

    def check(self, checker: OpChecker) -> Check:
        """Check everything that the kept calls wrote, including log-sum-exps and the cache."""
        places = self._call.places()
        checks = {
            index: checker.check(found, self.truth_of(index), places=places)
            for index, found in self._kept.items()
        }
        return summary(checks, self._call.damage())

    def truth_of(self, index: int) -> ChangedTruth:
        """Return what call `index` of the last pass must write."""
        return ChangedTruth(self._problem, change(self._problem, self._number, index))

    def compared(self) -> dict[int, torch.Tensor]:
        """Return the results [T, ..] without log-sum-exps, by call."""
        kept = ((index, [one[name] for name in one if name != "lse"]) for index, one in self._kept.items())
        return {index: torch.cat(results, dim=-1) for index, results in kept}

    def cache_bytes(self) -> int:
        return self._call.cache_bytes

    def weight_bytes(self) -> int:
        return self._call.weight_bytes if hasattr(self, "_call") else 0  # the op may have refused to pack

    def replace_ops(self, replace: Callable[[str, Any], Any]) -> None:
        self._choice = dataclasses.replace(self._choice, op=replace(self._problem.role, self._choice.op))

    def ops(self) -> dict[str, str]:
        return {self._problem.role: self._choice.name}

    def remarks(self) -> dict[str, list[str]]:
        return self._ops.remarks()


def check_lengths(kind: str, choice: Choice, scenario: Scenario, page_size: int) -> None:
    """Raise `UnsupportedBatch` if the op refuses the scenario's lengths."""
    if kind.endswith("attention"):
        pages = page_size if kind == "latent_attention" else None
        choice.check_batch(scenario.query_lens, scenario.kv_lens(0), pages)


def reference_results(problem: OpProblem, setting: Setting) -> Tensors:
    """Return the reference's results on the host, whose error bounds that of a fused op.

    They are those of the rows of the pool; NaN in the few that it was not run on.
    """
    host = torch.device("cpu")
    choice = Choice("reference", REFERENCE[problem.kind], dataclasses.replace(problem.spec, device=host))
    call = CALLS[problem.kind](problem, choice, Placement(host, setting.page_size, setting.seed))
    call.prepare()
    results = {name: torch.full_like(truth, torch.nan) for name, truth in problem.truth.items()}
    for one in covering(problem):
        call.forget()
        call.take(one)
        call.run()
        call.after(0)
        for name, found in call.collect()[0].items():
            pool = results[name]
            pool[one.rows[0]] = found.double().reshape(-1, *pool.shape[1:])
    return results
