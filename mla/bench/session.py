"""What a run is asked for, and one scenario of it: build implementations, measure, collect the cases."""

from __future__ import annotations

import datetime
import hashlib
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import msgspec
import torch

from mla.bench import agreement, engine, environment, peers, results, stats
from mla.bench.axes import Point
from mla.bench.ceilings import Ceilings
from mla.bench.check import Checker, expected_outputs
from mla.bench.estimate import forward_cost, forwards
from mla.bench.implementations import Implementation, MlaLayer, Setting
from mla.bench.inputs import Inputs, make_inputs
from mla.bench.memory import MemoryPlan, plan_memory, scenario_setting
from mla.bench.pace import Pace
from mla.bench.peers import Transformers
from mla.bench.workload import Scenario, WorkloadError
from mla.config import MLAConfig
from mla.errors import did_you_mean
from mla.ops import Ops
from mla.oracle import State
from mla.weights import random_state_dict

Note = Callable[[str], None]

IMPLEMENTATIONS: dict[str, Callable[[Setting, State], Implementation]] = {
    "mla": MlaLayer,
    "mla-reference": lambda setting, state: MlaLayer(setting, state, "mla-reference", "reference"),
    "transformers": Transformers,
    "transformers-eager": lambda setting, state: Transformers(setting, state, "eager"),
}


@dataclass(frozen=True)
class Request:
    """What the user asked for, resolved."""

    setting: Setting
    scenarios: Sequence[Point]
    implementations: Sequence[str]
    command: Sequence[str]  # options that every `repro` line repeats
    backend_version: str | None = None
    state: State | None = None  # weights of a checkpoint; None: random ones


def resolve_implementations(names: Sequence[str], settings: Sequence[Setting], note: Note) -> list[str]:
    """Return the implementations to run; without names, `mla` and, if it ever differs, `mla-reference`."""
    for name in names:
        if name not in IMPLEMENTATIONS:
            known = ", ".join(IMPLEMENTATIONS)
            hint = did_you_mean(name, list(IMPLEMENTATIONS))
            raise WorkloadError(f"unknown implementation '{name}'.{hint} There are: {known}.")
    if any(name.startswith("transformers") for name in names):
        peers.require()
    if names:
        return list(dict.fromkeys(names))
    if all(make_ops(setting).all_reference() for setting in settings):
        note("mla-reference is left out: no fused op was chosen, so it is identical to mla")
        return ["mla"]
    return ["mla", "mla-reference"]


def make_ops(setting: Setting) -> Ops:
    """Return the ops a layer of this setting chooses."""
    return Ops(setting.config, setting.backend.ops(), setting.dtype, setting.device, setting.ops)


def settings_of(setting: Setting, scenarios: Sequence[Point]) -> list[Setting]:
    """Return the settings in which a layer may choose other ops: one per number of heads and dtype."""
    distinct = {(scenario.heads, scenario.dtype): scenario for scenario in scenarios}
    return [scenario_setting(setting, scenario) for scenario in distinct.values()]


def plan(request: Request, scenario: Point) -> MemoryPlan:
    """Return the memory plan of a scenario; fused ops need the reference once, as their yardstick."""
    ops = make_ops(scenario_setting(request.setting, scenario))
    yardstick = 0 if ops.all_reference() or "mla" not in request.implementations else 1
    return plan_memory(request.setting, scenario, len(request.implementations), yardstick)


def total_forwards(request: Request) -> int:
    """Return the forwards of a run, checks and warm-ups included."""
    return len(request.implementations) * sum(forwards(scenario) for scenario in request.scenarios)


class Work:
    """One scenario: its weights, inputs and oracle, shared by all implementations."""

    def __init__(self, request: Request, scenario: Point, progress: engine.Progress, pace: Pace) -> None:
        self._request, self._scenario, self._progress, self._pace = request, scenario, progress, pace
        self._setting = scenario_setting(request.setting, scenario)
        self._ceilings = Ceilings(self._setting)
        self._inputs: Inputs | None = None
        self._state: State = {}
        self._checker: Checker | None = None
        self._outputs: dict[str, torch.Tensor] = {}  # of right implementations, on the host

    @property
    def prepared(self) -> bool:
        """Say whether anything large was made."""
        return bool(self._state)

    def prepare(self) -> tuple[Inputs, Checker]:
        """Make weights and inputs, and compute the oracle: on the host, once, and for minutes if need be."""
        config, seed, dtype = self._setting.config, self._setting.seed, self._setting.dtype
        if self._inputs is None or self._checker is None:
            self._progress(f"{self._scenario.name}: float64 oracle", 0)
            self._state = self._weights(config, seed, dtype)
            self._inputs = make_inputs(config, self._scenario, seed, dtype)
            expected = expected_outputs(config, self._state, self._scenario, self._inputs)
            self._checker = Checker(expected, dtype, self._reference_outputs)
        return self._inputs, self._checker

    def _weights(self, config: MLAConfig, seed: int, dtype: torch.dtype) -> State:
        if self._request.state is None:
            return random_state_dict(config, seed, dtype)
        return {name: weight.to(dtype) for name, weight in self._request.state.items()}

    def _reference_outputs(self) -> torch.Tensor:
        """Run the reference once: the yardstick of our own implementations."""
        inputs, _ = self.prepare()
        reference = IMPLEMENTATIONS["mla-reference"](self._setting, self._state)
        reference.load(self._scenario, inputs)
        for index in range(self._scenario.inputs):
            reference.step(index)
            self._pace.beat()
        return reference.outputs

    def measure(self, names: Sequence[str]) -> list[results.Case]:
        """Measure implementations that run in turns."""
        inputs, checker = self.prepare()
        built = [self._build(name) for name in names]
        timer = self._setting.backend.timer()
        measured = engine.measure(
            built, self._scenario, inputs, checker, timer, self._setting.seed, self._progress, self._pace
        )
        for one in built:
            if measured[one.name].check.status == "ok":
                self._outputs[one.name] = one.outputs.to("cpu", copy=True)
        return [self._case(one, measured[one.name], names, timer.clock) for one in built]

    def _build(self, name: str) -> Implementation:
        self._pace.enter(name)
        return IMPLEMENTATIONS[name](self._setting, self._state)

    def not_run(self, names: Sequence[str], reason: str) -> list[results.Case]:
        """Return cases that say why they hold no number."""
        return [self._empty(name, reason, interrupted=False) for name in names]

    def interrupted(self, names: Sequence[str]) -> list[results.Case]:
        """Return cases that an interrupt forestalled."""
        return [self._empty(name, "interrupted", interrupted=True) for name in names]

    def compare(self, cases: Sequence[results.Case]) -> None:
        """Tell the right implementations of this scenario how they relate."""
        agreement.compare(cases, self._outputs)

    def _case(
        self, one: Implementation, measured: engine.Measured, names: Sequence[str], clock: str
    ) -> results.Case:
        loaded = measured.check.status != "not run"
        case = self._empty(one.name, "", interrupted=False)
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
            case.roofline = self._ceilings.roofline(case.cost, latency.median)
        return case

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
            warmups=scenario.untimed,
            interleaved_with=[],
            check=results.Check(status="not run", reason=reason),
            latency_ms=None,
            tokens_per_s=None,
            plan_ms=None,
            switch_steps=[],
            cost=forward_cost(self._setting, scenario, range(scenario.inputs)),
            roofline=results.Roofline(),
            memory=results.Memory(weight_bytes=0, cache_bytes=0, peak_bytes=None),
            ops={},
            clock="none",
            interrupted=interrupted,
            repro=_repro(self._request, scenario, name),
            base=scenario.base,
            point=dict(scenario.point),
            dtype=str(self._setting.dtype).removeprefix("torch."),
            heads=self._setting.config.num_attention_heads,
        )


def _add_numbers(
    case: results.Case, scenario: Scenario, measured: engine.Measured, one: Implementation
) -> results.Latency:
    samples = [sample for samples in measured.passes for sample in samples]
    medians = [stats.median(samples) for samples in measured.passes]
    rates = [1e3 * scenario.tokens * len(samples) / sum(samples) for samples in measured.passes]
    case.latency_ms = results.Latency(
        median=stats.median(samples),
        ci95=stats.median_interval(medians),
        p10=stats.percentile(samples, 10),
        p90=stats.percentile(samples, 90),
        samples=samples,
    )
    case.tokens_per_s = results.Throughput(median=stats.median(rates), ci95=stats.median_interval(rates))
    case.plan_ms = one.plan_ms
    case.switch_steps = [
        index * scenario.steps for index, switched in enumerate(measured.after_switch) if switched
    ]
    return case.latency_ms


def _repro(request: Request, scenario: Point, name: str) -> str:
    words = [*request.command, "--scenario", scenario.base, *scenario.axis_words, "--implementations", name]
    return shlex.join(["python", "-m", "mla.bench", *words])


def describe_run(request: Request) -> results.Run:
    """Return a run without cases: everything else that its file says."""
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
        cases=[],
        plan=results.Plan(
            options=list(request.command),
            scenarios=[scenario.name for scenario in request.scenarios],
            implementations=list(request.implementations),
            digest=hashlib.sha256(msgspec.json.encode(request.scenarios)).hexdigest()[:16],
        ),
    )
