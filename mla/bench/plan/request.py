"""What a run is asked for, resolved: planning, running and printing only read it.

And what is said of it on stderr before it runs: the device, the layer, the plan, and what a dry run adds.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from mla.bench import results
from mla.bench.measure.target import MAX_S
from mla.bench.measure.variants import Variants, forwards, stage_forwards
from mla.bench.plan.memory import MemoryPlan, available_memory, gib, plan_memory
from mla.bench.results.cases import ADDED
from mla.bench.subjects.fixture import Fixture, make_fixture
from mla.bench.subjects.setting import Setting, scenario_setting
from mla.bench.workload.grid import Point
from mla.bench.workload.implementations import Named, is_ours, parse_one
from mla.bench.workload.scenario import spoken
from mla.command import environment
from mla.command.console import note
from mla.command.display import aligned
from mla.errors import OutOfMemory
from mla.text import counted, dtype_name, grouped
from mla.verify.layer_oracle import State
from mla_backends.errors import describe as describe_error
from mla_backends.errors import plugin_code

if TYPE_CHECKING:
    from mla.bench.plan.options import RunOptions
    from mla_backends.api import Backend


@dataclass(frozen=True)
class ScenarioPlan:
    """One scenario of a run, with all that follows from its lengths."""

    point: Point
    setting: Setting  # with the scenario's own heads, dtype, page size and layers
    memory: MemoryPlan
    ops: Mapping[str, Mapping[str, str]]  # implementation of ours -> role -> op
    refused: Mapping[str, str]  # implementation -> why an op of its refuses the lengths

    @property
    def name(self) -> str:
        """The scenario's name, unique in a run."""
        return self.point.name


def plan_scenarios(
    setting: Setting,
    points: Sequence[Point],
    names: Sequence[str] = (),
    cold: bool = False,
    state: State | None = None,
    baselines: Sequence[str] = (),
) -> tuple[list[ScenarioPlan], list[str]]:
    """Return every scenario of a run with its needs, and the implementations to run.

    Without names these are `mla`, `mla-reference` if a fused op makes it differ anywhere, and `baselines`.
    `cold`: caches are flushed before some forwards. `state`: the weights of a checkpoint.
    """
    fixtures = [make_fixture(scenario_setting(setting, point), point, state) for point in points]
    ours = [name for name in names or ["mla"] if is_ours(name)]
    ops = [{name: fixture.ops(name).names() for name in ours} for fixture in fixtures]
    fused = [any({*roles.values()} != {"reference"} for roles in named.values()) for named in ops]
    chosen = list(names) or ["mla", *["mla-reference"] * any(fused), *baselines]
    available = available_memory(setting.backend)
    plans = []
    for fixture, named, differs in zip(fixtures, ops, fused, strict=True):
        memory = plan_memory(fixture, chosen, differs, state is not None, available, cold)
        refused = {name: reason for name in ours if (reason := fixture.refusal(name))}
        plans.append(ScenarioPlan(fixture.point, fixture.setting, memory, named, refused))
    return plans, chosen


@dataclass(frozen=True)
class Request:
    """What the user asked for, resolved."""

    setting: Setting
    scenarios: Sequence[ScenarioPlan]
    implementations: Sequence[str]
    added: Sequence[str]  # of them, baselines that nobody asked for
    command: Sequence[str]  # options that every `repro` line repeats
    selection: Sequence[str]  # options that choose the scenarios
    options: RunOptions  # as the user gave them
    backend_version: str | None
    state: State | None = field(repr=False)  # weights of a checkpoint; None: random ones
    variants: Variants

    @property
    def points(self) -> list[Point]:
        """The scenarios' own descriptions."""
        return [scenario.point for scenario in self.scenarios]

    def forwards(self, point: Point) -> int:
        """Return roughly the forwards of a scenario, checks and warm-ups included; slow ones run fewer."""
        count = len(self.implementations) * forwards(self.variants.timed, point)
        ours = sum(map(is_ours, self.implementations)) if self.options.stages else 0
        return count + ours * stage_forwards(point)


def empty_run(request: Request) -> results.Run:
    """Return a run without cases: everything else that its file says."""
    setting = request.setting
    facts = provenance(setting.backend, request.backend_version)
    if request.added:
        facts["environment"][ADDED] = ",".join(request.added)
    return results.Run(
        schema_version=results.SCHEMA_VERSION,
        **facts,
        config=msgspec.json.decode(msgspec.json.encode(asdict(setting.config))),  # with lists, as it is read
        dtype=dtype_name(setting.dtype),
        attention=setting.attention,
        page_size=setting.page_size,
        seed=setting.seed,
        cases=[],
        plan=results.Plan(
            options=list(request.command),
            scenarios=[scenario.name for scenario in request.scenarios],
            implementations=list(request.implementations),
            digest=hashlib.sha256(msgspec.json.encode(request.points)).hexdigest()[:16],
        ),
    )


def provenance(backend: Backend, version: str | None) -> dict[str, Any]:
    """Return what a result says of its making, by field; `version` is that of the backend's distribution."""
    info = backend.device_info()
    return {
        "argv": ["python -m mla.bench", *sys.argv[1:]],
        "created": environment.now(),
        "git_commit": environment.git_commit(),
        "backend": results.BackendFacts(
            name=backend.name,
            version=version,
            device=info.name,
            memory_bytes=info.memory_bytes,
            cache_bytes=info.cache_bytes,
            build=environment.build_digest(backend),
        ),
        "environment": environment.environment(backend),
    }


# ---------------------------------------------------------------------------------------- what is said before


# Seconds after which a dry run tries no further case.
TRYING_S = 20.0
_HEADER = ("case", "scenario", "implementation", "about forwards", "device", "host", "one forward")


def description(request: Request, verbose: bool) -> Iterator[str]:
    """Yield what is about to be measured: the plan, or everything that follows from the options."""
    setting, plans = request.setting, [scenario.memory for scenario in request.scenarios]
    if verbose:
        yield from _facts(request)
    if (ranks := setting.ranks) is not None and ranks.assumed:  # for ranks that are not there
        where = f"{counted(ranks.world, 'rank')} of {ranks.layout} on this device, one by one"
        yield f"simulated  {where}; {ranks.assumed}: times are predicted"
    together = all(plan.side_by_side for plan in plans if plan.fits)
    order = "interleaved" if together else "one at a time where memory is short"
    forwards = (
        f"about {sum(map(request.forwards, request.points))} forwards, checked against a float64 oracle"
    )
    yield f"plan       {', '.join(request.implementations)}, {order}; {forwards}"
    if verbose:
        counts = [plan.implementations if plan.side_by_side else 1 for plan in plans]
        device = max(plan.device_bytes(count) for plan, count in zip(plans, counts, strict=True))
        on_host = max(plan.host_bytes(count) for plan, count in zip(plans, counts, strict=True))
        available = " and ".join(map(gib, plans[0].available))
        yield f"memory     {gib(device)} on the device, {gib(on_host)} on the host; available {available}"
    yield from _same_ops(request)
    if request.options.profile:
        yield f"profile    {request.options.profile}: one more pass of every case, once all are timed"


def _facts(request: Request) -> Iterator[str]:
    """Yield what runs where, the fused ops of implementations of ours, and all scenarios."""
    setting = request.setting
    facts = environment.environment(setting.backend)
    threads, source = counted(int(facts["torch_threads"]), "thread"), facts.get("backend.threads_from")
    device = setting.backend.device_info().name
    threads += f" ({source})" if source else ""
    yield f"backend    {setting.backend.name} on {device}, torch {facts['torch']}, {threads}"
    yield (
        f"config     {setting.config.name}, {dtype_name(setting.dtype)}, attention {setting.attention}, "
        f"page size {setting.page_size}, seed {setting.seed}"
    )
    for name, ops in request.scenarios[0].ops.items():
        if parse_one(name) != Named("mla-reference"):
            fused = [f"{role}={op}" for role, op in ops.items() if op != "reference"]
            yield f"ops        {name}: {', '.join(fused) or 'reference for every op'}"
    for point in request.points:
        shortest, longest = min(point.history), max(point.history)
        layers = f"{point.layers} layers, " if point.layers > 1 else ""
        yield (
            f"scenario   {point.name}: {counted(len(point.query_lens), 'request')}, "
            f"{counted(point.tokens, 'new token')} per forward, "
            f"history {shortest if shortest == longest else f'{shortest} to {longest}'}, "
            f"{layers}{counted(point.rounds, 'pass', 'es')} of {point.steps}"
        )
    if len(request.variants.timed) > 1:
        yield f"timed      {request.variants}"


def _same_ops(request: Request) -> Iterator[str]:
    """Yield a line for each implementation that runs the ops of an earlier one in every scenario."""
    ops = {name: [plan.ops.get(name) for plan in request.scenarios] for name in request.implementations}
    names = [name for name in ops if None not in ops[name]]
    for place, name in enumerate(names):
        if same := [other for other in names[:place] if ops[other] == ops[name]]:
            yield f"same ops   {name} runs the ops of {same[0]}: a difference between them is noise"


def require_memory(request: Request) -> None:
    """Raise `OutOfMemory` when no scenario fits; those that do not are skipped in a run with others."""
    if not any(scenario.memory.fits for scenario in request.scenarios):
        least = min(request.scenarios, key=lambda scenario: scenario.memory.device_bytes(1))
        raise OutOfMemory(
            f"this run needs {least.memory.shortage()}: use fewer requests, shorter histories, a smaller "
            "config or --topk."
        )


@dataclass
class _Case:
    """An implementation of a scenario in a dry run."""

    scenario: ScenarioPlan
    name: str
    work: float  # of a forward: FLOPs and bytes, added
    count: int  # forwards of a run
    said: str  # of its forward; "" while unknown
    seconds: float = 0.0  # of its forward; 0: unknown

    def row(self, number: int) -> tuple[str, ...]:
        """Return the line of the table."""
        sizes = self.scenario.memory.device_bytes(1), self.scenario.memory.host_bytes(1)
        return (str(number), self.scenario.name, self.name, str(self.count), *map(gib, sizes), self.said)


def dry_run(request: Request) -> None:
    """List every case with its memory and the time of a forward, measured or estimated from all others.

    What is spread over ranks is not tried: all would have to take part.
    """
    cases = _cases(request)
    work = sum(case.work for case in cases if case.seconds)
    rate = sum(case.seconds for case in cases) / work if work else 0.0
    for case in (case for case in cases if not case.said):
        case.seconds = rate * case.work
        case.said = f"not tried, about {spoken(case.seconds)}" if case.seconds else "not tried"
    by_scenario = grouped(cases, lambda case: case.scenario.name).values()
    seconds = [sum(case.count * case.seconds for case in scenario) for scenario in by_scenario]
    total = sum(seconds if request.options.counted else (min(each, MAX_S) for each in seconds))
    rows = [case.row(number) for number, case in enumerate(cases, 1)]
    note(f"\n{aligned(_HEADER, rows, _HEADER)}")
    for scenario in request.scenarios:
        for name, reason in scenario.refused.items():
            note(f"{scenario.name}, {name} will be skipped: {reason}")
    beside = "limits, float64 oracle and what was not tried"
    if all(case.said != "not tried" for case in cases):
        beside = "limits and float64 oracle"
    note(f"{counted(len(cases), 'case')}, about {spoken(total)} of forwards, plus {beside}")


def _cases(request: Request) -> list[_Case]:
    """Return all cases, and try as many as `TRYING_S` allows."""
    end, cases = time.monotonic() + TRYING_S, list[_Case]()
    for scenario in request.scenarios:
        fixture = make_fixture(scenario.setting, scenario.point, request.state)
        each, count = fixture.cost(), forwards(request.variants.timed, scenario.point)
        work = scenario.point.layers * float(each.flops + each.bytes)
        for name in request.implementations:
            unable = "refused, skipped" if name in scenario.refused else ""
            unable = unable if scenario.memory.fits else "does not fit, skipped"
            cases.append(case := _Case(scenario, name, work, count, unable))
            if case.said or request.setting.ranks is not None or time.monotonic() >= end:
                continue
            try:
                with plugin_code(), torch.no_grad():
                    case.seconds = _forward(fixture, scenario, name)
                case.said = spoken(case.seconds)
            except Exception as error:  # noqa: BLE001  # a dry run says what would happen
                note(f"{scenario.name}, {name}: one forward was tried and failed: {describe_error(error)}")
                case.said = "failed"
    return cases


def _forward(fixture: Fixture, scenario: ScenarioPlan, name: str) -> float:
    """Return the seconds of the second forward: the first may compile what others use."""
    inputs = fixture.inputs
    impl = fixture.build(name)
    impl.load(scenario.point, inputs)
    for _ in range(2):
        impl.restore()
        start = time.monotonic()
        impl.before(0)
        impl.step(0)
        scenario.setting.backend.synchronize()
        taken = time.monotonic() - start
        impl.after(0)
    return taken
