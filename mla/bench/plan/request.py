"""What a run is asked for, resolved: planning, running and printing only read it."""

from __future__ import annotations

import datetime
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

import msgspec

from mla.bench import results
from mla.bench.measure import stages
from mla.bench.measure.variants import Variants, forwards
from mla.bench.plan.memory import MemoryPlan, plan_memory
from mla.bench.subjects.fixture import Needs, make_fixture
from mla.bench.subjects.setting import Setting, scenario_setting
from mla.bench.workload.grid import Point
from mla.command import environment
from mla.text import dtype_name
from mla.verify.layer_oracle import State
from mla_backends.api import Backend


@dataclass(frozen=True)
class ScenarioPlan:
    """One scenario of a run, with all that follows from its lengths."""

    point: Point
    setting: Setting  # with the scenario's own heads, dtype, page size and layers
    needs: Needs
    memory: MemoryPlan

    @property
    def name(self) -> str:
        """The scenario's name, unique in a run."""
        return self.point.name

    def for_implementations(self, names: Sequence[str]) -> ScenarioPlan:
        """Return the plan with the memory that these implementations need together."""
        fused = "mla" in names and not self.needs.all_reference
        references = self.needs.reference_copies if fused else 0
        return replace(self, memory=plan_memory(self.setting, self.needs, len(names), references))


def plan_scenario(setting: Setting, point: Point, names: Sequence[str]) -> ScenarioPlan:
    """Return one scenario of a run with this setting and these implementations."""
    own = scenario_setting(setting, point)
    needs = make_fixture(own, point).needs()
    return ScenarioPlan(point, own, needs, plan_memory(own, needs, 1)).for_implementations(names)


@dataclass(frozen=True)
class Request:
    """What the user asked for, resolved."""

    setting: Setting
    scenarios: Sequence[ScenarioPlan]
    implementations: Sequence[str]
    command: Sequence[str]  # options that every `repro` line repeats
    selection: Sequence[str] = ()  # options that choose the scenarios
    backend_version: str | None = None
    state: State | None = field(default=None, repr=False)  # weights of a checkpoint; None: random ones
    stages: bool = False  # time the parts of a forward, after everything else
    variants: Variants = Variants()  # noqa: RUF009  # frozen

    def replanned(self, points: Sequence[Point], names: Sequence[str]) -> Request:
        """Return the same request with other scenarios and implementations."""
        plans = [plan_scenario(self.setting, point, names) for point in points]
        return replace(self, scenarios=plans, implementations=list(names))

    @property
    def points(self) -> list[Point]:
        """The scenarios' own descriptions."""
        return [scenario.point for scenario in self.scenarios]

    def total_forwards(self) -> int:
        """Return the minimum number of forwards, checks and warm-ups included."""
        timed, points = self.variants.timed, self.points
        count = len(self.implementations) * sum(forwards(timed, point) for point in points)
        if not self.stages:
            return count
        ours = sum(name.startswith("mla") for name in self.implementations)
        return count + ours * sum(map(stages.total_forwards, points))


def empty_run(request: Request) -> results.Run:
    """Return a run without cases: everything else that its file says."""
    setting = request.setting
    return results.Run(
        schema_version=results.SCHEMA_VERSION,
        argv=["python -m mla.bench", *sys.argv[1:]],
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        git_commit=environment.git_commit(),
        backend=backend_facts(setting.backend, request.backend_version),
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
            digest=hashlib.sha256(msgspec.json.encode(request.points)).hexdigest()[:16],
        ),
    )


def backend_facts(backend: Backend, version: str | None) -> results.BackendFacts:
    """Return what ran; `version` is that of the backend's distribution."""
    info = backend.device_info()
    return results.BackendFacts(
        name=backend.name,
        version=version,
        device=info.name,
        memory_bytes=info.memory_bytes,
        cache_bytes=info.cache_bytes,
    )
