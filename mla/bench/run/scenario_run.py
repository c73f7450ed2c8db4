"""One scenario of a run: build implementations, measure, collect the cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mla.bench import results
from mla.bench.limits.roofline import RooflineModel
from mla.bench.measure import agreement, engine, stages, summary
from mla.bench.measure.hooks import Hooks
from mla.bench.measure.samples import Measurement
from mla.bench.plan.repro import case_command
from mla.bench.plan.request import Request, ScenarioPlan
from mla.bench.subjects.base import Implementation
from mla.bench.subjects.fixture import make_fixture
from mla.bench.subjects.layer import MlaLayer
from mla.command.console import note
from mla.errors import MLAError, UnsupportedBatch
from mla.text import dtype_name


class ScenarioRun:
    """One scenario: its fixture, measured implementation by implementation."""

    def __init__(
        self, request: Request, scenario: ScenarioPlan, progress: engine.ProgressCallback, hooks: Hooks
    ) -> None:
        self._request, self._point, self._setting = request, scenario.point, scenario.setting
        self._progress, self._hooks = progress, hooks
        self._fixture = make_fixture(scenario.setting, scenario.point, request.state, hooks.heartbeat)
        self._ceilings = RooflineModel(self._setting)
        self.refusal: MLAError | None = None  # the first of an op
        self._outputs: dict[str, agreement.Outputs] = {}  # of right implementations

    @property
    def prepared(self) -> bool:
        """Whether anything large was made."""
        return self._fixture.prepared

    def prepare(self) -> tuple[Any, Any]:
        """Make operands, and compute the oracle: on the host, once, which may take minutes."""
        if not self.prepared:
            self._progress(f"{self._point.name}: float64 oracle", 0)
        return self._fixture.prepare()

    def measure(self, names: Sequence[str]) -> list[results.Case]:
        """Measure implementations, interleaved."""
        inputs, checker = self.prepare()
        built = [self._build(name) for name in names]
        backend, seed, variants = self._setting.backend, self._setting.seed, self._request.variants
        measured = engine.measure(
            built, self._point, inputs, checker, backend, seed, variants, self._progress, self._hooks
        )
        for one in built:
            if measured[one.name].check.status in ("ok", "doubtful"):
                self._outputs[one.name] = measured[one.name].outputs
        for one in built:
            if measured[one.name].refused:
                self.refuse(one.name, measured[one.name].check.reason)
        ran = [one.name for one in built if not measured[one.name].refused]
        cases = [self._case(one, measured[one.name], ran) for one in built]
        if self._request.stages:
            for one, case in zip(built, cases, strict=True):
                self._add_stages(one, case, checker)
        return cases

    def refuse(self, name: str, reason: str) -> None:
        """Say which implementation is skipped because one of its ops refuses the batch."""
        note(f"{self._point.name}, {name} is skipped: {reason}")
        where = f"scenario '{self._point.name}', implementation '{name}'"
        self.refusal = self.refusal or UnsupportedBatch(f"{where}: {reason}")

    def _add_stages(self, one: Implementation, case: results.Case, checker: Any) -> None:
        """Time the parts of our own layer's forward, if it has numbers at all."""
        if isinstance(one, MlaLayer) and case.latency_ms and not case.interrupted:
            stages.add(case, one, self._point, checker, self._ceilings, self._progress)

    def ceilings(self) -> list[results.Ceiling]:
        """Return the limits that the rooflines used."""
        return self._ceilings.used()

    def _build(self, name: str) -> Implementation:
        self._hooks.enter(name)
        return self._fixture.build(name)

    def not_run(self, names: Sequence[str], reason: str) -> list[results.Case]:
        """Return cases that say why they hold no number."""
        return [self._empty(name, reason, interrupted=False) for name in names]

    def interrupted(self, names: Sequence[str]) -> list[results.Case]:
        """Return cases that an interrupt prevented."""
        return [self._empty(name, "interrupted", interrupted=True) for name in names]

    def compare(self, cases: Sequence[results.Case]) -> None:
        """Tell the right implementations of this scenario how they relate."""
        agreement.compare(cases, self._outputs)

    def _case(self, one: Implementation, measured: Measurement, names: Sequence[str]) -> results.Case:
        loaded = measured.check.status != "not run"
        case = self._empty(one.name, "", interrupted=False)
        summary.fill(case, self._point, measured, one)
        case.interleaved_with = [name for name in names if name != one.name] if one.name in names else []
        case.ops = one.ops()
        case.memory = results.Memory(
            weight_bytes=one.weight_bytes(),
            cache_bytes=one.cache_bytes() if loaded else 0,
            peak_bytes=self._setting.backend.memory().peak,
            transient_bytes=measured.transient_bytes,
        )
        if case.latency_ms is not None:
            case.roofline = self._roofline(case.cost, case.latency_ms.median)
        return case

    def _roofline(self, work: results.Cost, latency_ms: float) -> results.Roofline:
        """Return the roofline of one layer, where a forward moves the bytes of all."""
        layers = self._point.layers
        whole = results.Cost(flops=layers * work.flops, bytes=layers * work.bytes)
        found = self._ceilings.roofline(whole, layers * latency_ms)
        found.floor_ms = None if found.floor_ms is None else found.floor_ms / layers
        return found

    def _empty(self, name: str, reason: str, interrupted: bool) -> results.Case:
        scenario = self._point
        return results.Case(
            scenario=scenario.name,
            mode=scenario.mode,
            implementation=name,
            query_lens=list(scenario.query_lens),
            history=list(scenario.history),
            steps_per_pass=scenario.steps,
            passes=0,
            warmups=0,
            interleaved_with=[],
            check=results.Check(status="not run", reason=reason),
            latency_ms=None,
            tokens_per_s=None,
            plan_ms=None,
            switch_steps=[],
            cost=self._fixture.cost(),
            roofline=results.Roofline(),
            memory=results.Memory(weight_bytes=0, cache_bytes=0, peak_bytes=None),
            ops={},
            clock="none",
            interrupted=interrupted,
            repro=case_command(self._request.command, scenario, self._fixture.repeated_as(name)),
            base=scenario.base,
            point=dict(scenario.point),
            dtype=dtype_name(self._setting.dtype),
            heads=self._setting.config.num_attention_heads,
            layers=scenario.layers,
            op=self._fixture.op,
        )
