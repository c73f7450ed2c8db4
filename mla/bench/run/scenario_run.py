"""What a run is asked for, and one scenario of it: build implementations, measure, collect the cases."""

from __future__ import annotations

import datetime
import hashlib
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
import torch

from mla.bench import results
from mla.bench.limits.roofline import Ceilings
from mla.bench.measure import agreement, engine, stages, summary, variants
from mla.bench.measure.hooks import Hooks
from mla.bench.measure.samples import Measurement
from mla.bench.measure.variants import Variants
from mla.bench.plan.memory import MemoryPlan, plan_memory
from mla.bench.subjects import transformers_layer as peers
from mla.bench.subjects.base import Implementation
from mla.bench.subjects.fixture import LayerSubject, OpSubject, Subject
from mla.bench.subjects.layer import MlaLayer
from mla.bench.subjects.setting import Setting, scenario_setting
from mla.bench.subjects.stack import MlaStack
from mla.bench.subjects.transformers_layer import TransformersLayer
from mla.bench.workload.grid import Point
from mla.bench.workload.op_scenario import OpScenario, expand
from mla.command import environment
from mla.command.console import Note
from mla.errors import UsageError, did_you_mean
from mla.layer.ops import Ops, layer_roles
from mla.text import dtype_name
from mla.verify.layer_oracle import State

IMPLEMENTATIONS: dict[str, Callable[[Setting, State], Implementation]] = {
    "mla": lambda setting, state: _layers(setting)(setting, state),
    "mla-reference": lambda setting, state: _layers(setting)(setting, state, "mla-reference", "reference"),
    "transformers": TransformersLayer,
    "transformers-eager": lambda setting, state: TransformersLayer(setting, state, "eager"),
}


def _layers(setting: Setting) -> type[MlaLayer]:
    return MlaStack if setting.layers > 1 else MlaLayer


@dataclass(frozen=True)
class Request:
    """What the user asked for, resolved."""

    setting: Setting
    scenarios: Sequence[Point]
    implementations: Sequence[str]
    command: Sequence[str]  # options that every `repro` line repeats
    backend_version: str | None = None
    state: State | None = None  # weights of a checkpoint; None: random ones
    stages: bool = False  # time the parts of a forward, after everything else
    variants: Variants = Variants()  # noqa: RUF009  # frozen


def expand_ops(scenarios: Sequence[Point], setting: Setting) -> list[Point]:
    """Return the scenarios, each op replaced by the roles it has in this layer. Raises `UsageError`."""
    roles = layer_roles(setting.config, setting.dtype, setting.device)
    return expand(scenarios, setting.config, {role: kind for role, (kind, _) in roles.items()})


def resolve_implementations(
    names: Sequence[str], setting: Setting, note: Note, scenarios: Sequence[Point]
) -> list[str]:
    """Return the implementations to run; without names, `mla` and, if it ever differs, `mla-reference`."""
    for name in names:
        if name not in IMPLEMENTATIONS:
            known = ", ".join(IMPLEMENTATIONS)
            hint = did_you_mean(name, list(IMPLEMENTATIONS))
            raise UsageError(f"unknown implementation '{name}'.{hint} There are: {known}.")
    peer = next((name for name in names if not name.startswith("mla")), None)
    if peer and any(isinstance(scenario, OpScenario) for scenario in scenarios):
        raise UsageError(f"{peer} runs the whole layer: --op times mla and mla-reference.")
    if peer and any(scenario.layers > 1 for scenario in scenarios):
        raise UsageError(f"{peer} runs one layer at a time: leave it out, or --layers.")
    if peer:
        peers.require()
    if names:
        return list(dict.fromkeys(names))
    if all(all_reference(setting, scenario) for scenario in _distinct(scenarios)):
        note("mla-reference is left out: no fused op was chosen, so it is identical to mla")
        return ["mla"]
    return ["mla", "mla-reference"]


def all_reference(setting: Setting, scenario: Point) -> bool:
    """Say whether no fused op runs in a scenario."""
    ops = make_ops(scenario_setting(setting, scenario))
    return ops[scenario.role].name == "reference" if isinstance(scenario, OpScenario) else ops.all_reference()


def make_ops(setting: Setting) -> Ops:
    """Return the ops a layer of this setting chooses."""
    return Ops(setting.config, setting.backend.ops(), setting.dtype, setting.device, setting.ops)


def _distinct(scenarios: Sequence[Point]) -> list[Point]:
    """Return one scenario per head count, dtype and role, by which ops are chosen."""
    role = [one.role if isinstance(one, OpScenario) else None for one in scenarios]
    keys = zip((one.heads for one in scenarios), (one.dtype for one in scenarios), role, strict=True)
    return list(dict(zip(keys, scenarios, strict=True)).values())


def plan(request: Request, scenario: Point) -> MemoryPlan:
    """Return the memory plan of a scenario; fused ops need the reference once, as their yardstick."""
    fused = "mla" in request.implementations and not all_reference(request.setting, scenario)
    yardstick = 1 if fused and not isinstance(scenario, OpScenario) else 0  # an op's is on the host
    return plan_memory(request.setting, scenario, len(request.implementations), yardstick)


def total_forwards(request: Request) -> int:
    """Return the forwards of a run at least, checks and warm-ups included."""
    kinds = request.variants.timed
    count = len(request.implementations) * sum(variants.forwards(kinds, one) for one in request.scenarios)
    if not request.stages:
        return count
    ours = sum(name.startswith("mla") for name in request.implementations)
    return count + ours * sum(map(stages.total_forwards, request.scenarios))


def make_subject(request: Request, scenario: Point, beat: Callable[[], None]) -> Subject:
    """Return what a scenario measures; `beat` is called after every forward of the yardstick."""
    setting = scenario_setting(request.setting, scenario)
    if isinstance(scenario, OpScenario):
        return OpSubject(setting, scenario)
    return LayerSubject(setting, scenario, request.state, IMPLEMENTATIONS, beat)


class Work:
    """One scenario: its subject, measured implementation by implementation."""

    def __init__(
        self, request: Request, scenario: Point, progress: engine.ProgressCallback, hooks: Hooks
    ) -> None:
        self._request, self._scenario, self._progress, self._hooks = request, scenario, progress, hooks
        self._subject = make_subject(request, scenario, hooks.heartbeat)
        self._setting = self._subject.setting
        self._ceilings = Ceilings(self._setting)
        self._outputs: dict[str, torch.Tensor] = {}  # of right implementations, on the host

    @property
    def prepared(self) -> bool:
        """Say whether anything large was made."""
        return self._subject.prepared

    def prepare(self) -> tuple[Any, Any]:
        """Make operands, and compute the oracle: on the host, once, and for minutes if need be."""
        if not self.prepared:
            self._progress(f"{self._scenario.name}: float64 oracle", 0)
        return self._subject.prepare()

    def measure(self, names: Sequence[str]) -> list[results.Case]:
        """Measure implementations that run in turns."""
        inputs, checker = self.prepare()
        built = [self._build(name) for name in names]
        backend, seed, ways = self._setting.backend, self._setting.seed, self._request.variants
        measured = engine.measure(
            built, self._scenario, inputs, checker, backend, seed, ways, self._progress, self._hooks
        )
        for one in built:
            if measured[one.name].check.status == "ok":
                self._outputs[one.name] = one.compared().to("cpu", copy=True)
        cases = [self._case(one, measured[one.name], names) for one in built]
        if self._request.stages:
            for one, case in zip(built, cases, strict=True):
                self._add_stages(one, case, checker)
        return cases

    def _add_stages(self, one: Implementation, case: results.Case, checker: Any) -> None:
        """Time the parts of our own layer's forward, if it has numbers at all."""
        if isinstance(one, MlaLayer) and case.latency_ms and not case.interrupted:
            stages.add(case, one, self._scenario, checker, self._ceilings, self._progress)

    def ceilings(self) -> list[results.Ceiling]:
        """Return what the rooflines were held against."""
        return self._ceilings.used()

    def _build(self, name: str) -> Implementation:
        self._hooks.enter(name)
        return self._subject.build(name)

    def not_run(self, names: Sequence[str], reason: str) -> list[results.Case]:
        """Return cases that say why they hold no number."""
        return [self._empty(name, reason, interrupted=False) for name in names]

    def interrupted(self, names: Sequence[str]) -> list[results.Case]:
        """Return cases that an interrupt forestalled."""
        return [self._empty(name, "interrupted", interrupted=True) for name in names]

    def compare(self, cases: Sequence[results.Case]) -> None:
        """Tell the right implementations of this scenario how they relate."""
        agreement.compare(cases, self._outputs)

    def _case(self, one: Implementation, measured: Measurement, names: Sequence[str]) -> results.Case:
        loaded = measured.check.status != "not run"
        case = self._empty(one.name, "", interrupted=False)
        summary.fill(case, self._scenario, measured, one)
        case.interleaved_with = [name for name in names if name != one.name]
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
        layers = self._scenario.layers
        whole = results.Cost(flops=layers * work.flops, bytes=layers * work.bytes)
        found = self._ceilings.roofline(whole, layers * latency_ms)
        found.floor_ms = None if found.floor_ms is None else found.floor_ms / layers
        return found

    def _empty(self, name: str, reason: str, interrupted: bool) -> results.Case:
        scenario = self._scenario
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
            cost=self._subject.cost(),
            roofline=results.Roofline(),
            memory=results.Memory(weight_bytes=0, cache_bytes=0, peak_bytes=None),
            ops={},
            clock="none",
            interrupted=interrupted,
            repro=_repro(self._request, scenario, name),
            base=scenario.base,
            point=dict(scenario.point),
            dtype=dtype_name(self._setting.dtype),
            heads=self._setting.config.num_attention_heads,
            layers=scenario.layers,
            op=self._subject.op,
        )


def _repro(request: Request, scenario: Point, name: str) -> str:
    words = [*request.command, *scenario.selection, "--implementations", name]
    return shlex.join(["python", "-m", "mla.bench", *words])


def describe_run(request: Request) -> results.Run:
    """Return a run without cases: everything else that its file says."""
    setting = request.setting
    return results.Run(
        schema_version=results.SCHEMA_VERSION,
        argv=["python -m mla.bench", *sys.argv[1:]],
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        git_commit=environment.git_commit(),
        backend=environment.backend_facts(setting.backend, request.backend_version),
        environment=environment.environment(setting.backend),
        config=asdict(setting.config),
        dtype=dtype_name(setting.dtype),
        attention=setting.attention,
        page_size=setting.page_size,
        seed=setting.seed,
        cases=[],
        plan=results.Plan(
            options=list(request.command),
            scenarios=[scenario.name for scenario in request.scenarios],
            implementations=list(request.implementations),
            digest=hashlib.sha256(msgspec.json.encode(request.scenarios)).hexdigest()[:16],
        ),
    )
