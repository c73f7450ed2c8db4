"""What a run is asked for, resolved: planning, running and printing only read it."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from mla.bench import results
from mla.bench.measure.variants import Variants, forwards, stage_forwards
from mla.bench.plan.memory import MemoryPlan, available_memory, plan_memory
from mla.bench.results.cases import ADDED
from mla.bench.subjects.fixture import make_fixture
from mla.bench.subjects.setting import Setting, scenario_setting
from mla.bench.workload.grid import Point
from mla.bench.workload.implementations import is_ours
from mla.command import environment
from mla.text import dtype_name
from mla.verify.layer_oracle import State

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
