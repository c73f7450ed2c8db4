"""One run: build implementations, measure every scenario, collect the result."""

from __future__ import annotations

import datetime
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from mla.bench import agreement, engine, environment, peers, results, stats
from mla.bench.ceilings import Ceilings
from mla.bench.implementations import Implementation, MlaLayer, Setting
from mla.bench.layer_stack import MlaStack
from mla.bench.memory import MemoryPlan, plan_memory
from mla.bench.op_scenario import OpScenario, expand
from mla.bench.peers import Transformers
from mla.bench.subject import LayerSubject, OpSubject, Subject
from mla.bench.workload import Scenario, WorkloadError
from mla.errors import MLAError, did_you_mean
from mla.ops import Ops, layer_roles
from mla.oracle import State
from mla_backends import BackendError

Note = Callable[[str], None]

IMPLEMENTATIONS: dict[str, Callable[[Setting, State], Implementation]] = {
    "mla": lambda setting, state: _layers(setting)(setting, state),
    "mla-reference": lambda setting, state: _layers(setting)(setting, state, "mla-reference", "reference"),
    "transformers": Transformers,
    "transformers-eager": lambda setting, state: Transformers(setting, state, "eager"),
}


def _layers(setting: Setting) -> type[MlaLayer]:
    return MlaStack if setting.layers > 1 else MlaLayer


@dataclass(frozen=True)
class Request:
    """What the user asked for, resolved."""

    setting: Setting
    scenarios: Sequence[Scenario]
    implementations: Sequence[str]
    command: Sequence[str]  # options that every `repro` line repeats
    backend_version: str | None = None
    state: State | None = None  # weights of a checkpoint; None: random ones


def expand_ops(scenarios: Sequence[Scenario], setting: Setting) -> list[Scenario]:
    """Return the scenarios, each op replaced by the roles it has in this layer. Raises `WorkloadError`."""
    roles = layer_roles(setting.config, setting.dtype, setting.device)
    return expand(scenarios, setting.config, {role: kind for role, (kind, _) in roles.items()})


def resolve_implementations(
    names: Sequence[str], setting: Setting, note: Note, scenarios: Sequence[Scenario] = ()
) -> list[str]:
    """Return the implementations to run; without names, `mla` and, if it differs, `mla-reference`."""
    for name in names:
        if name not in IMPLEMENTATIONS:
            known = ", ".join(IMPLEMENTATIONS)
            hint = did_you_mean(name, list(IMPLEMENTATIONS))
            raise WorkloadError(f"unknown implementation '{name}'.{hint} There are: {known}.")
    peer = next((name for name in names if not name.startswith("mla")), None)
    if peer and any(isinstance(scenario, OpScenario) for scenario in scenarios):
        raise WorkloadError(f"{peer} runs the whole layer: --op times mla and mla-reference.")
    if peer and any(scenario.layers > 1 for scenario in scenarios):
        raise WorkloadError(f"{peer} runs one layer at a time: leave it out, or --layers.")
    if peer:
        peers.require()
    if names:
        return list(dict.fromkeys(names))
    if _all_reference(setting, scenarios):
        note("mla-reference is left out: no fused op was chosen, so it is identical to mla")
        return ["mla"]
    return ["mla", "mla-reference"]


def _all_reference(setting: Setting, scenarios: Sequence[Scenario]) -> bool:
    """Say whether no fused op runs in any scenario."""
    ops = make_ops(setting)
    roles = {scenario.role for scenario in scenarios if isinstance(scenario, OpScenario)}
    return all(ops[role].name == "reference" for role in roles) if roles else ops.all_reference()


def make_ops(setting: Setting) -> Ops:
    """Return the ops a layer of this setting chooses."""
    return Ops(setting.config, setting.backend.ops(), setting.dtype, setting.device, setting.ops)


def plan(request: Request) -> MemoryPlan:
    """Return the memory plan of a request; fused ops need the reference once, as their yardstick."""
    of_ops = any(isinstance(scenario, OpScenario) for scenario in request.scenarios)  # theirs is on the host
    fused = "mla" in request.implementations and not make_ops(request.setting).all_reference()
    yardstick = 1 if fused and not of_ops else 0
    return plan_memory(request.setting, request.scenarios, len(request.implementations), yardstick)


def total_forwards(request: Request) -> int:
    """Return the forwards of a run, checks and warm-ups included, for a progress bar."""
    return len(request.implementations) * sum(
        scenario.inputs + scenario.untimed + scenario.turns * scenario.steps for scenario in request.scenarios
    )


@dataclass(frozen=True)
class Outcome:
    """A run, complete or cut short by an interrupt or by the failure to print; finished cases are kept."""

    run: results.Run
    interrupted: bool = False
    failure: MLAError | BackendError | None = None


class RunFailed(MLAError):
    """An op, a backend or torch raised while a scenario ran."""

    exit_code = 3


def execute(request: Request, progress: engine.Progress, note: Note) -> Outcome:
    """Run every scenario, in turns where memory allows it."""
    memory = plan(request)
    memory.require()
    if not memory.side_by_side:
        note("not interleaved: the implementations do not fit into memory together, so each runs alone")
    names = request.implementations
    turns = [list(names)] if memory.side_by_side else [[name] for name in names]
    cases: list[results.Case] = []
    ceilings = Ceilings(request.setting)
    for scenario in request.scenarios:
        work = _Work(request, scenario, progress, ceilings)
        done: list[results.Case] = []
        for together in turns:
            try:
                done += work.measure(together)
            except Exception as error:  # noqa: BLE001  # whatever a plugin raises, finished cases must survive
                return Outcome(_run(request, cases + done), failure=_failure(scenario, error))
            if any(case.interrupted for case in done):
                return Outcome(_run(request, cases + done), interrupted=True)
        work.compare(done)
        cases += done
    return Outcome(_run(request, cases))


def _failure(scenario: Scenario, error: Exception) -> MLAError | BackendError:
    """Return what to print: our own sentence, or what was raised and where."""
    if isinstance(error, (MLAError, BackendError)):
        return error
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error).partition("\n")[0]
    return RunFailed(
        f"scenario '{scenario.name}' failed: {type(error).__name__}: {text} "
        f"({os.path.basename(where.filename)}:{where.lineno} in {where.name})."
    )


def make_subject(request: Request, scenario: Scenario) -> Subject:
    """Return what a scenario measures."""
    if isinstance(scenario, OpScenario):
        return OpSubject(request.setting, scenario)
    return LayerSubject(request.setting, scenario, request.state, IMPLEMENTATIONS)


class _Work:
    """One scenario: its subject, measured implementation by implementation."""

    def __init__(
        self, request: Request, scenario: Scenario, progress: engine.Progress, ceilings: Ceilings
    ) -> None:
        self._request, self._scenario, self._progress = request, scenario, progress
        self._ceilings = ceilings
        self._subject = make_subject(request, scenario)
        self._setting = self._subject.setting
        self._outputs: dict[str, torch.Tensor] = {}  # of right implementations, on the host

    def measure(self, names: Sequence[str]) -> list[results.Case]:
        """Measure implementations that run in turns."""
        try:
            self._progress(f"{self._scenario.name}: float64 oracle", 0)
            inputs, checker = self._subject.prepare()
            built = [self._subject.build(name) for name in names]
        except KeyboardInterrupt:
            return [self._not_run(name) for name in names]
        timer = self._setting.backend.timer()
        measured = engine.measure(
            built, self._scenario, inputs, checker, timer, self._setting.seed, self._progress
        )
        for one in built:
            if measured[one.name].check.status == "ok":
                self._outputs[one.name] = one.compared().to("cpu", copy=True)
        return [self._case(one, measured[one.name], names, timer.clock) for one in built]

    def compare(self, cases: Sequence[results.Case]) -> None:
        """Tell the right implementations of this scenario how they relate."""
        agreement.compare(cases, self._outputs)

    def _case(
        self, one: Implementation, measured: engine.Measured, names: Sequence[str], clock: str
    ) -> results.Case:
        loaded = measured.check.status != "not run"
        case = self._not_run(one.name)
        case.check = measured.check
        case.interrupted = measured.interrupted
        case.interleaved_with = [name for name in names if name != one.name]
        case.passes = len(measured.passes)
        case.clock = clock
        case.ops = one.ops()
        case.memory = results.Memory(
            weight_bytes=one.weight_bytes(),
            cache_bytes=one.cache_bytes() if loaded else 0,
            peak_bytes=self._setting.backend.memory().peak,
            transient_bytes=measured.transient_bytes,
        )
        if measured.passes:
            latency = _add_numbers(case, self._scenario, measured, one)
            case.roofline = self._roofline(case.cost, latency.median)
        return case

    def _roofline(self, work: results.Cost, latency_ms: float) -> results.Roofline:
        """Return the roofline of one layer, where a forward moves the bytes of all."""
        layers = self._scenario.layers
        whole = results.Cost(flops=layers * work.flops, bytes=layers * work.bytes)
        found = self._ceilings.roofline(whole, layers * latency_ms)
        found.floor_ms = None if found.floor_ms is None else found.floor_ms / layers
        return found

    def _not_run(self, name: str) -> results.Case:
        scenario = self._scenario
        return results.Case(
            scenario=scenario.name,
            mode=scenario.mode,
            implementation=name,
            query_lens=list(scenario.query_lens),
            history=list(scenario.history),
            steps_per_pass=scenario.steps,
            passes=0,
            warmups=scenario.untimed,
            interleaved_with=[],
            check=results.Check(status="not run", reason="interrupted"),
            latency_ms=None,
            tokens_per_s=None,
            plan_ms=None,
            switch_steps=[],
            cost=self._subject.cost(),
            roofline=results.Roofline(),
            memory=results.Memory(weight_bytes=0, cache_bytes=0, peak_bytes=None),
            ops={},
            clock="none",
            interrupted=True,
            repro=_repro(self._request, scenario, name),
            base=scenario.name,
            dtype=str(self._setting.dtype).removeprefix("torch."),
            heads=self._setting.config.num_attention_heads,
            layers=scenario.layers,
            op=self._subject.op,
        )


def _add_numbers(
    case: results.Case, scenario: Scenario, measured: engine.Measured, one: Implementation
) -> results.Latency:
    passes = [[sample / scenario.layers for sample in samples] for samples in measured.passes]
    samples = [sample for samples in passes for sample in samples]
    medians = [stats.median(samples) for samples in passes]
    rates = [1e3 * scenario.tokens * len(samples) / sum(samples) for samples in passes]
    case.latency_ms = results.Latency(
        median=stats.median(samples),
        ci95=stats.median_interval(medians),
        p10=stats.percentile(samples, 10),
        p90=stats.percentile(samples, 90),
        samples=samples,
    )
    case.tokens_per_s = results.Throughput(median=stats.median(rates), ci95=stats.median_interval(rates))
    case.plan_ms = None if one.plan_ms is None else one.plan_ms / scenario.layers
    case.switch_steps = [
        index * scenario.steps for index, switched in enumerate(measured.after_switch) if switched
    ]
    return case.latency_ms


def _repro(request: Request, scenario: Scenario, name: str) -> str:
    words = [*request.command, *scenario.selection, "--implementations", name]
    return shlex.join(["python", "-m", "mla.bench", *words])


def _run(request: Request, cases: list[results.Case]) -> results.Run:
    setting = request.setting
    info = setting.backend.device_info()
    return results.Run(
        schema_version=results.SCHEMA_VERSION,
        argv=["python -m mla.bench", *sys.argv[1:]],
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        git_commit=environment.git_commit(),
        backend=results.BackendFacts(
            name=setting.backend.name,
            version=request.backend_version,
            device=info.name,
            memory_bytes=info.memory_bytes,
            cache_bytes=info.cache_bytes,
        ),
        environment=environment.environment(setting.backend),
        config=asdict(setting.config),
        dtype=str(setting.dtype).removeprefix("torch."),
        attention=setting.attention,
        page_size=setting.page_size,
        seed=setting.seed,
        cases=cases,
    )
