"""One run: build implementations, measure every scenario, collect the result."""

from __future__ import annotations

import datetime
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from mla import cost
from mla.bench import agreement, engine, environment, lanes, numbers, peers, results
from mla.bench.ceilings import Ceilings
from mla.bench.check import Checker, expected_outputs
from mla.bench.implementations import Implementation, MlaLayer, Setting
from mla.bench.inputs import Inputs, make_inputs
from mla.bench.measured import Measured
from mla.bench.memory import MemoryPlan, plan_memory, scenario_config
from mla.bench.peers import Transformers
from mla.bench.workload import Scenario, WorkloadError
from mla.config import MLAConfig
from mla.errors import MLAError, did_you_mean
from mla.ops import Ops
from mla.oracle import State
from mla.weights import random_state_dict
from mla_backends import BackendError

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
    scenarios: Sequence[Scenario]
    implementations: Sequence[str]
    command: Sequence[str]  # options that every `repro` line repeats
    backend_version: str | None = None
    state: State | None = None  # weights of a checkpoint; None: random ones
    lanes: lanes.Lanes = lanes.Lanes()  # noqa: RUF009  # frozen


def resolve_implementations(names: Sequence[str], setting: Setting, note: Note) -> list[str]:
    """Return the implementations to run; without names, `mla` and, if it differs, `mla-reference`."""
    for name in names:
        if name not in IMPLEMENTATIONS:
            known = ", ".join(IMPLEMENTATIONS)
            hint = did_you_mean(name, list(IMPLEMENTATIONS))
            raise WorkloadError(f"unknown implementation '{name}'.{hint} There are: {known}.")
    if any(name.startswith("transformers") for name in names):
        peers.require()
    if names:
        return list(dict.fromkeys(names))
    if make_ops(setting).all_reference():
        note("mla-reference is left out: no fused op was chosen, so it is identical to mla")
        return ["mla"]
    return ["mla", "mla-reference"]


def make_ops(setting: Setting) -> Ops:
    """Return the ops a layer of this setting chooses."""
    return Ops(setting.config, setting.backend.ops(), setting.dtype, setting.device, setting.ops)


def plan(request: Request) -> MemoryPlan:
    """Return the memory plan of a request; fused ops need the reference once, as their yardstick."""
    yardstick = 0 if make_ops(request.setting).all_reference() or "mla" not in request.implementations else 1
    return plan_memory(request.setting, request.scenarios, len(request.implementations), yardstick)


def total_forwards(request: Request) -> int:
    """Return the forwards of a run at least, checks and warm-ups included, for a progress bar."""
    return len(request.implementations) * sum(
        lanes.forwards(request.lanes.kinds, scenario) for scenario in request.scenarios
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


class _Work:
    """One scenario: its weights, inputs and oracle, shared by all implementations."""

    def __init__(
        self, request: Request, scenario: Scenario, progress: engine.Progress, ceilings: Ceilings
    ) -> None:
        self._request, self._scenario, self._progress = request, scenario, progress
        self._ceilings = ceilings
        setting = request.setting
        self._setting = replace(setting, config=scenario_config(setting.config, scenario))
        self._inputs: Inputs | None = None
        self._state: State = {}
        self._checker: Checker | None = None
        self._outputs: dict[str, torch.Tensor] = {}  # of right implementations, on the host

    def _prepare(self) -> tuple[Inputs, Checker]:
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
        inputs, _ = self._prepare()
        reference = IMPLEMENTATIONS["mla-reference"](self._setting, self._state)
        reference.load(self._scenario, inputs)
        for index in range(self._scenario.inputs):
            reference.step(index)
        return reference.outputs

    def measure(self, names: Sequence[str]) -> list[results.Case]:
        """Measure implementations that run in turns."""
        try:
            inputs, checker = self._prepare()
            built = [IMPLEMENTATIONS[name](self._setting, self._state) for name in names]
        except KeyboardInterrupt:
            return [self._not_run(name) for name in names]
        backend, seed, ways = self._setting.backend, self._setting.seed, self._request.lanes
        measured = engine.measure(built, self._scenario, inputs, checker, backend, seed, ways, self._progress)
        for one in built:
            if measured[one.name].check.status == "ok":
                self._outputs[one.name] = one.outputs.to("cpu", copy=True)
        return [self._case(one, measured[one.name], names) for one in built]

    def compare(self, cases: Sequence[results.Case]) -> None:
        """Tell the right implementations of this scenario how they relate."""
        agreement.compare(cases, self._outputs)

    def _case(self, one: Implementation, measured: Measured, names: Sequence[str]) -> results.Case:
        loaded = measured.check.status != "not run"
        case = self._not_run(one.name)
        numbers.fill(case, self._scenario, measured, one)
        case.interleaved_with = [name for name in names if name != one.name]
        case.ops = one.ops()
        case.memory = results.Memory(
            weight_bytes=one.weight_bytes(),
            cache_bytes=one.cache_bytes() if loaded else 0,
            peak_bytes=self._setting.backend.memory().peak,
            transient_bytes=measured.transient_bytes,
        )
        if case.latency_ms is not None:
            case.roofline = self._ceilings.roofline(case.cost, case.latency_ms.median)
        return case

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
            warmups=0,
            interleaved_with=[],
            check=results.Check(status="not run", reason="interrupted"),
            latency_ms=None,
            tokens_per_s=None,
            plan_ms=None,
            switch_steps=[],
            cost=self._cost(),
            roofline=results.Roofline(),
            memory=results.Memory(weight_bytes=0, cache_bytes=0, peak_bytes=None),
            ops={},
            clock="none",
            interrupted=True,
            repro=_repro(self._request, scenario, name),
            base=scenario.name,
            dtype=str(self._setting.dtype).removeprefix("torch."),
            heads=self._setting.config.num_attention_heads,
        )

    def _cost(self) -> results.Cost:
        """Average the work of a pass's forwards, counted for our layer's paths."""
        config, scenario, setting = self._setting.config, self._scenario, self._setting
        lengths = [scenario.kv_lens(step) for step in range(scenario.inputs)]
        flops = [cost.step_flops(config, scenario.query_lens, kv, setting.attention) for kv in lengths]
        size = setting.dtype.itemsize
        moved = [cost.step_bytes(config, scenario.query_lens, kv, size) for kv in lengths]
        return results.Cost(flops=round(sum(flops) / len(flops)), bytes=round(sum(moved) / len(moved)))


def _repro(request: Request, scenario: Scenario, name: str) -> str:
    words = [*request.command, "--scenario", scenario.name, "--implementations", name]
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
