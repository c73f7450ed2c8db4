"""One scenario of a run: build implementations, measure, collect the cases."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import torch

from mla.bench import results
from mla.bench.limits import roofline
from mla.bench.limits.roofline import MAX_TIMES, RooflineModel
from mla.bench.measure import engine, samples
from mla.bench.measure.engine import Hooks
from mla.bench.measure.samples import Measurement
from mla.bench.plan.options import case_command
from mla.bench.plan.request import Request, ScenarioPlan
from mla.bench.results.cases import busiest
from mla.bench.results.schema import Case, Cost, Roofline
from mla.bench.run.keeper import Keeper
from mla.bench.run.profile import add_stages
from mla.bench.subjects.base import Implementation, Outputs
from mla.bench.subjects.fixture import make_fixture
from mla.bench.subjects.inputs import Requests
from mla.bench.subjects.layer import MlaLayer
from mla.bench.subjects.setting import Setting, say_remarks
from mla.bench.workload.scenario import Scenario
from mla.cache.formats import format_error
from mla.command.console import note
from mla.errors import MLAError, UnsupportedBatch
from mla.parallel.layout import Layout, rank_work
from mla.text import dtype_name
from mla.verify.verdict import Check


def rank_costs(setting: Setting, layout: Layout, scenario: Scenario, steps: int | None = None) -> list[Cost]:
    """Return what each rank does in a forward, per layer: the mean over a pass, or its first `steps`."""
    count = min(scenario.inputs, steps or scenario.inputs)

    @functools.cache
    def mean(dp: int, dcp: int) -> Cost:  # the parts of `tp` are alike: rank `dcp` is in the first
        part = Requests.of(scenario, dp, layout.dp).scenario(scenario)
        lengths = [(part.query_lens, part.kv_lens(step)) for step in range(count)]
        size, path, cached = setting.dtype.itemsize, setting.attention, setting.token_bytes
        works = [rank_work(setting.config, layout, dcp, *each, size, path, cached) for each in lengths]
        flops, moved = (round(sum(column) / count) for column in zip(*works, strict=True))
        return Cost(flops=flops, bytes=moved)

    places = map(layout.place, range(layout.world))
    return [mean(place.dp, place.dcp) for place in places]


class ScenarioRun:
    """One scenario: its fixture, measured implementation by implementation."""

    def __init__(
        self,
        request: Request,
        scenario: ScenarioPlan,
        progress: engine.ProgressCallback,
        hooks: Hooks,
        keeper: Keeper | None = None,
        done: Sequence[Case] = (),
    ) -> None:
        """`done`: cases of this scenario that an earlier run measured."""
        self._request, self._point, self._setting = request, scenario.point, scenario.setting
        self._progress = progress
        self._running, self._keeper, self._threads_changed = hooks.enter, keeper, False
        self._first, warmups = request.implementations[0], request.options.warmups or 0
        hooks = replace(hooks, warmups=warmups, added=request.added, first=self._first)
        self._hooks = replace(hooks, enter=self._enter, failed=self._failed)
        self._fixture = make_fixture(scenario.setting, scenario.point, request.state, self._computing)
        self.ceilings = RooflineModel(self._setting)
        self.refusal: MLAError | None = None  # the first of an op
        self.outputs: dict[str, Outputs] = {}  # of right implementations
        first = (case.latency_ms for case in done if case.implementation == self._first and case.latency_ms)
        layers = self._point.layers
        self._first_ms = sum(layers * latency.median for latency in first)  # of a forward, once it ran right

    @property
    def prepared(self) -> bool:
        """Whether anything large was made."""
        return self._fixture.prepared

    def measure_limits(self) -> None:
        """Measure the limits that the device puts to this scenario."""
        self._progress(f"{self._point.name}: limits of the device", 0)
        self.ceilings.known(self._whole(self._costs(self._setting)).bytes)

    def prepare(self) -> tuple[Any, Any]:
        """Make operands, and compute the oracle: on the host, once, which may take minutes."""
        if not self.prepared:
            self._computing()
            self._fixture.prepare()
            self._hooks.target.leave_half()
        return self._fixture.prepare()

    def _computing(self) -> None:
        """Give a sign of life: the oracle is computed, forward by forward of the reference."""
        self._progress(f"{self._point.name}: float64 oracle", 0)
        self._hooks.heartbeat()

    def measure(self, names: Sequence[str]) -> list[Case]:
        """Measure implementations, interleaved."""
        inputs, checker = self.prepare()  # which calls ops as well: of what is a limit
        self._restore_threads()
        built = []
        for name in names:
            self._hooks.enter(name)
            built.append(self._fixture.build(name))
        given = self._setting.backend, self._setting.seed, self._request.variants, self._progress
        hooks = replace(self._hooks, first_ms=self._first_ms)
        measured = engine.measure(built, self._point, inputs, checker, *given, hooks)
        self._restore_threads()
        for name in names:
            measurement = measured[name]
            if measurement.check.status in ("ok", "doubtful"):
                self.outputs[name] = measurement.outputs
            if measurement.check.status == "ok" and name == self._first:
                self._first_ms = measurement.warmup.typical_ms or 0.0
            if measurement.refused:
                self.refuse(name, measurement.check.reason)
        self._progress(f"{self._point.name}: limits of the device", 0)
        self.ceilings.again()
        ran = [impl.name for impl in built if not measured[impl.name].refused]
        cases = [self._case(impl, measured[impl.name], ran) for impl in built]
        for impl, case in zip(built, cases, strict=True) if self._request.options.stages else ():
            if isinstance(impl, MlaLayer) and case.latency_ms and not case.interrupted:  # of our own layer
                add_stages(case, impl, self._point, checker, self._progress)
        return cases

    def _failed(self, impl: Implementation, check: Check) -> None:
        """Keep the first failure of the run, if asked for: called once per wrong implementation."""
        if self._keeper is not None:
            command = case_command(self._request.command, self._point, self._fixture.repeated_as(impl.name))
            self._keeper.keep(impl, check, self._fixture, command, self._hooks.heartbeat)

    def _enter(self, name: str) -> None:
        self._restore_threads()
        self._running(name)

    def _restore_threads(self) -> None:
        """Let torch have the host threads of the run again; say once if a backend changed them."""
        now, count = torch.get_num_threads(), self._setting.threads
        if now != count:
            torch.set_num_threads(count)
            if not self._threads_changed:
                self._threads_changed = True
                by = f"backend '{self._setting.backend.name}' changed torch's host threads"
                note(f"{self._point.name}: {by} from {count} to {now}, so not all forwards ran on as many")

    def refuse(self, name: str, reason: str) -> None:
        """Say which implementation is skipped because one of its ops refuses the batch."""
        note(f"{self._point.name}, {name} is skipped: {reason}")
        where = f"scenario '{self._point.name}', implementation '{name}'"
        self.refusal = self.refusal or UnsupportedBatch(f"{where}: {reason}")

    def _case(self, impl: Implementation, measured: Measurement, names: Sequence[str]) -> Case:
        loaded = measured.check.status != "not run"
        (case,) = self.not_run([impl.name], "")
        facts = impl.facts()
        samples.fill(case, self._point, measured, facts)
        whole = case.latency_ms and not case.interrupted  # after that, ranks may be anywhere in a forward
        case.spread = impl.spread() if whole else None
        case.cost = self._fixture.cost(case.steps_per_pass)
        if case.spread is not None:
            costs = self._costs(self._setting, case.steps_per_pass)
            case.spread.ranks = [
                msgspec.structs.replace(rank, cost=cost)
                for rank, cost in zip(case.spread.ranks, costs, strict=True)
            ]
        case.interleaved_with = [name for name in names if name != impl.name] if impl.name in names else []
        case.ops, case.op_remarks = facts.ops, facts.remarks
        say_remarks(case.op_remarks)  # those that came while it ran
        case.memory = results.Memory(
            weight_bytes=facts.weight_bytes,
            cache_bytes=facts.cache_bytes if loaded else 0,
            peak_bytes=self._setting.backend.memory().peak,
            transient_bytes=measured.transient_bytes,
        )
        if impl.computes:
            fewest = replace(self._setting, attention="auto")  # paths that others may take
            least = self._whole(self._costs(fewest, case.steps_per_pass))
            judge(case, least, self.ceilings, self._hooks.heartbeat)
            roofline.place_case(case, self.ceilings.used())
        return case

    def _whole(self, costs: Sequence[Cost]) -> Cost:
        """Return a device's work in a forward, which moves the bytes of all layers: the busiest one's."""
        layers, most = self._point.layers, busiest(costs)
        return Cost(flops=layers * most.flops, bytes=layers * most.bytes)

    def _costs(self, setting: Setting, steps: int | None = None) -> list[Cost]:
        """Return the work of one layer on every device."""
        if setting.ranks is not None:
            return rank_costs(setting, setting.ranks.layout, self._point, steps)
        return [make_fixture(setting, self._point, self._request.state).cost(steps)]

    def not_run(self, names: Sequence[str], reason: str, interrupted: bool = False) -> list[Case]:
        """Return cases that say why they hold no number."""
        scenario = self._point
        return [
            Case(
                scenario=scenario.name,
                mode=scenario.mode,
                implementation=name,
                query_lens=list(scenario.query_lens),
                history=list(scenario.history),
                steps_per_pass=scenario.steps,
                check=results.Check(status="not run", reason=reason),
                cost=self._fixture.cost(),
                memory=results.Memory(weight_bytes=0, cache_bytes=0, peak_bytes=None),
                interrupted=interrupted,
                repro=case_command(self._request.command, scenario, self._fixture.repeated_as(name)),
                base=scenario.base,
                point=dict(scenario.point),
                dtype=dtype_name(self._setting.dtype),
                heads=self._setting.config.num_attention_heads,
                format_error=format_error(self._setting.codec) or None,
                layers=scenario.layers,
                op=self._fixture.op,
                batch_spec=scenario.batch_spec,
            )
            for name in names
        ]


# --------------------------------------------------------------------------------------- the device's limits

# A number far above a limit is withheld, whoever measured wrongly.

# A case far above its limit: seconds of waiting before the limit is measured again. Another load may have
# slowed it down, and a load comes and goes in seconds.
PAUSES_S = (0.3, 1.0, 2.0)


def judge(case: Case, least: Cost, ceilings: RooflineModel, beat: Callable[[], None] = lambda: None) -> None:
    """Withhold the number of a case that is far above its limit; `least` is the work of a whole forward.

    `beat` is called between measurements, which may take seconds.
    """
    if case.latency_ms is None:
        return
    milliseconds = case.layers * case.latency_ms.median
    if ceilings.above(least, milliseconds):
        ceilings.again(MAX_TIMES)
    for pause in PAUSES_S:
        if not ceilings.implausible(least, milliseconds):
            return
        beat()
        time.sleep(pause)
        beat()
        ceilings.again(MAX_TIMES)
    if reason := ceilings.implausible(least, milliseconds):
        withhold(case, reason)


def withhold(case: Case, reason: str) -> None:
    """Take the numbers from a case that are in doubt; what its check found otherwise stays."""
    in_doubt = partial(msgspec.structs.replace, status="doubtful", reason=reason)
    case.check = in_doubt(case.check)
    case.latency_ms = case.tokens_per_s = case.plan_ms = case.launch_bound = case.new_lengths = None
    case.roofline, case.stages, case.switch_steps, case.passes = Roofline(), [], [], 0
    case.spread = None
    for timing in case.timings:
        if timing.latency_ms is not None:
            timing.check, timing.latency_ms, timing.passes = in_doubt(timing.check), None, 0
