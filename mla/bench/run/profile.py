"""Where a forward's time goes, in passes of their own after all others: stages, and a trace for viewers.

Stages (`--stages`): every op timed alone. The device is synchronized between two ops, which a forward is not,
so the parts add up to more than it takes. A trace (`--profile`): passes as torch's profiler sees them. Each
op of ours is a range inside that of its forward: a viewer shows what each launches, and the gaps between.
Whatever goes wrong with a trace is a note: the result is complete.
"""

from __future__ import annotations

import gc
import gzip
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import torch

from mla.bench import results
from mla.bench.limits.microbench import no_garbage_collection
from mla.bench.measure.variants import stage_forwards
from mla.bench.plan.request import Request
from mla.bench.results.schema import Case, Cost, Roofline, Stage
from mla.bench.run.watchdog import Budget
from mla.bench.subjects.base import Implementation, LayerChecker
from mla.bench.subjects.fixture import make_fixture
from mla.bench.subjects.layer import MlaLayer
from mla.bench.workload.scenario import Scenario
from mla.command import exit_codes
from mla.command.console import note
from mla.command.display import Progress
from mla.command.exit_codes import Exit, interrupted
from mla.command.files import TRACE_START, write_bytes
from mla.cost import Work, role_costs
from mla.errors import ResultError
from mla.text import counted
from mla_backends.api import HostTimer, Timer
from mla_backends.errors import first_line

VIEWERS = "open it at https://ui.perfetto.dev or chrome://tracing"


def profile(request: Request, run: results.Run, target: Path, budget: Budget, code: Exit) -> Exit:
    """Write the trace of one more pass of every case with a number, each implementation built alone.

    Return `code`, the run's exit code, or another one if this is interrupted.
    """
    cases = [(case.scenario, case.implementation) for case in run.cases if case.latency_ms]
    trace, where = Trace(), "the start"
    try:
        with Progress(len(cases)) as progress:
            for plan in request.scenarios:
                names = [name for name in request.implementations if (plan.name, name) in cases]
                if names and budget.left() <= 0:
                    note(f"--budget leaves no time to profile {plan.name} and what follows")
                    break
                fixture = make_fixture(plan.setting, plan.point, request.state)
                for name in names:
                    where = f"{plan.name} / {name}"
                    progress.advance(f"profiling {where}", 0)
                    inputs, impl = fixture.inputs, with_ranges(fixture.build(name))
                    impl.load(plan.point, inputs)
                    trace.add(record(impl, plan.point, plan.setting.backend.synchronize))
                    progress.advance(f"profiling {where}", 1)
    except KeyboardInterrupt:
        note("profiling was interrupted: the result is complete, the trace is not")
        code = interrupted()
    except Exception as error:  # noqa: BLE001  # a profiler must not cost a run
        said = f"{type(error).__name__}: {first_line(error)} ({exit_codes.place(error)})"
        note(f"profiling failed at {where}: {said}; the result is complete")
    if not trace.passes:
        note(f"profile    nothing was recorded, so '{target}' was not written")
        return code
    try:
        data = trace.encode()
        write_bytes(gzip.compress(data) if target.suffix == ".gz" else data, target)
        note(f"profile    {_summary(trace, request.setting.device)} in '{target}': {VIEWERS}")
    except ResultError as error:
        note(f"profile    {error}")
    return code


def _summary(trace: Trace, device: torch.device) -> str:
    """Return what the trace holds, and what it lacks."""
    said = f"{counted(trace.passes, 'pass', 'es')}, eager, with {trace.operators} operators of torch"
    if trace.launches:
        return f"{said} and {trace.launches} kernels"
    names = ", ".join(activity.name for activity in activities(device))
    lacking = f" and no kernels of {device.type} (this torch records: {names})"
    return said + lacking * (device.type != "cpu")


# ---------------------------------------------------------------------------------------------------- passes


class Inside:
    """Stands in for an op: every call is inside a context, and all else is the op's own."""

    def __init__(self, op: Any, context: Callable[[], AbstractContextManager[Any]]) -> None:
        self._op, self._context = op, context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._op, name)

    def __call__(self, *leading: Any, **tensors: Any) -> None:
        with self._context():
            self._op(*leading, **tensors)


# ------------------------------------------------------------------------------------------------ stages

BETWEEN = "between ops"
# Numbers of the passes, which select their inputs.
PASSES = 1 << 22

# Stage -> its parts: roles of `mla.layer.ops`, `gather` (context latents, and keys made of them), `gate`
# (sigmoid and product), `extend` and `plan`, and the layer's own host code and copies between them.
STAGES = {
    "query and latent projections": ("qkv_a_proj", "q_a_layernorm", "q_b_proj"),
    "cache write": ("write_latent",),
    "indexer": (
        *("index_k_proj", "write_index_key", "index_q_proj", "rotate_index_query", "index_weights_proj"),
        "select_latents",
    ),
    "attention": (
        *("w_uk", "rotate_query", "latent_attention", "sparse_latent_attention", "w_uv"),
        *("kv_b_proj", "gather", "expanded_attention"),
    ),
    "output gate": ("g_proj", "gate"),
    "output projection": ("o_proj",),
    "bookkeeping": ("extend", "plan"),
    BETWEEN: (BETWEEN,),
}

# Milliseconds of one forward, by part.
Sample = dict[str, float]


class Stopwatch:
    """Adds up the milliseconds of named regions. A region inside another one interrupts it."""

    def __init__(self, timer: Timer) -> None:
        self._timer = timer
        self._open: list[str] = []
        self._times: Sample = {}

    def take(self) -> Sample:
        """Return the times since the last call."""
        times, self._times = self._times, {}
        return times

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        """Time the `with` block, or a function that this decorates, excluding other regions inside it."""
        self._stop()
        self._open.append(name)
        self._timer.start()
        try:
            yield
        finally:
            self._stop()
            self._open.pop()
            if self._open:
                self._timer.start()

    def _stop(self) -> None:
        if self._open:
            name = self._open[-1]
            self._times[name] = self._times.get(name, 0.0) + self._timer.stop()


def watch_parts(impl: MlaLayer, watch: Stopwatch) -> None:
    """Put every part of a loaded layer's forwards into a region, for good."""
    layer, step = impl.layer, impl.layer.step
    impl.replace_ops(lambda role, op: Inside(op, partial(watch.region, role)))
    rebuild = watch.region("gather")(step.rebuild)
    gate = watch.region("gate")(step.gate)
    layer.step = replace(step, rebuild=rebuild, gate=gate)
    impl.extend = watch.region("extend")(impl.extend)  # type: ignore[method-assign]
    layer.plan = watch.region("plan")(layer.plan)  # type: ignore[method-assign]


def watched_step(impl: MlaLayer, watch: Stopwatch) -> None:
    """Run a forward as `step` does, and plan it in the open."""
    with watch.region(BETWEEN):
        batch = impl.batch if impl.scenario.mode == "prefill" else impl.extend()
        impl.layer.plan(batch)
        impl.forward(batch, impl.x, impl.outs)


def add_stages(
    case: Case,
    impl: MlaLayer,
    scenario: Scenario,
    checker: LayerChecker,
    progress: Callable[[str, int], None],
) -> None:
    """Run passes that fill `case.stages`, the last thing that is done with a layer.

    A case that is wrong in these passes loses its numbers.
    """
    watch, samples, check = Stopwatch(HostTimer(impl.setting.backend.synchronize)), list[Sample](), case.check
    watch_parts(impl, watch)
    gc.collect()
    try:
        with no_garbage_collection():
            while len(samples) < stage_forwards(scenario) and check.status == "ok":
                impl.restore(PASSES + len(samples))  # inputs that no other pass had
                for index in range(scenario.inputs):
                    impl.before(index)
                    watched_step(impl, watch)
                    impl.after(index)
                    samples.append(watch.take())
                check = impl.check(checker)
                progress(f"{scenario.name}: stages of {impl.name}", scenario.inputs)
    except KeyboardInterrupt:
        case.interrupted = True
        return
    if check.status == "ok":
        case.stages = summary(samples, costs(impl, scenario))
        return
    check.reason = f"right in timed passes and wrong when its stages were timed: {check.reason}"
    case.check, case.roofline = check, Roofline()
    case.latency_ms = case.tokens_per_s = None


def costs(impl: MlaLayer, scenario: Scenario) -> dict[str, Cost]:
    """Return role -> its work, averaged over the forwards of a pass."""
    setting, total, count = impl.setting, dict[str, Work](), scenario.inputs
    for step in range(count):
        lengths, size = (scenario.query_lens, scenario.kv_lens(step)), setting.dtype.itemsize
        cached = setting.token_bytes, setting.index_bytes
        for role, work in role_costs(setting.config, *lengths, size, setting.attention, *cached).items():
            total[role] = total.get(role, Work()) + work
    return {role: Cost(flops=round(f / count), bytes=round(b / count)) for role, (f, b) in total.items()}


def summary(samples: Sequence[Sample], costs: Mapping[str, Cost]) -> list[Stage]:
    """Return a row per stage that ran and, where it has several parts, one for each: "stage: part"."""

    def stage(name: str, parts: Sequence[str]) -> Stage:
        ms = median(sum(sample.get(part, 0.0) for part in parts) for sample in samples)
        known = [costs[part] for part in parts if part in costs]
        if not known:
            return Stage(name=name, ms=ms)
        cost = Cost(flops=sum(part.flops for part in known), bytes=sum(part.bytes for part in known))
        return Stage(name=name, ms=ms, cost=cost)

    rows = []
    for name, parts in STAGES.items():
        ran = [part for part in parts if any(part in sample for sample in samples)]
        rows += [stage(name, ran)] if ran else []
        rows += [stage(f"{name}: {part}", [part]) for part in ran if len(ran) > 1]
    return rows


# ------------------------------------------------------------------------------------------------- traces

# The most forwards of a recorded pass: enough to see launches and gaps, and a file that viewers still open.
TRACE_FORWARDS = 10
# Microseconds between passes on the time axis of the trace.
GAP_US = 1000.0
# Phases of events whose id links them to others of the same pass.
_LINKED = frozenset("stfbne")
# What the profiler writes anew for every pass.
_OF_ONE_PASS = frozenset({"traceEvents", "traceName", "trace_id", "baseTimeNanoseconds"})


class Trace:
    """Passes in the order they are added, end to end: whatever happened between them is left out."""

    def __init__(self) -> None:
        self.passes = self.operators = self.launches = 0
        self._facts: dict[str, Any] = {}
        self._events: list[Any] = []
        self._end = 0.0

    def add(self, document: dict[str, Any]) -> None:
        """Append what the profiler wrote about one pass: an object with a list `traceEvents`."""
        events = document["traceEvents"]
        start = min(float(event["ts"]) for event in events if event["ph"] == "X")
        begin, self.passes = self._end, self.passes + 1
        for event in events:
            if "ts" in event:
                event["ts"] = max(begin, begin + float(event["ts"]) - start)
                self._end = max(self._end, event["ts"] + float(event.get("dur", 0)))
            if event["ph"] in _LINKED and isinstance(event.get("id"), int):
                event["id"] += self.passes << 32
        self._end += GAP_US
        self._facts = {name: value for name, value in document.items() if name not in _OF_ONE_PASS}
        self._events += events
        self.operators += sum(event.get("cat") == "cpu_op" for event in events)
        self.launches += sum(event.get("cat") == "kernel" for event in events)

    def encode(self) -> bytes:
        """Return the trace as JSON."""
        rest = msgspec.json.encode({**self._facts, "traceEvents": self._events})
        return TRACE_START + b"," + rest[1:] + b"\n"


def with_ranges(impl: Implementation) -> Implementation:
    """Return an implementation, before it is loaded, with each op of ours in a range "role (op)".

    Of several layers, the range says which: "layer 3: role (op)".
    """
    names = impl.facts().ops

    def ranged(where: str, op: Any) -> Inside:
        title = f"{where} ({names[where.rpartition(': ')[2]]})"
        return Inside(op, partial(torch.profiler.record_function, title))

    if replace_ops := getattr(impl, "replace_ops", None):  # ours
        replace_ops(ranged)
    return impl


def record(impl: Implementation, scenario: Scenario, synchronize: Callable[[], None]) -> dict[str, Any]:
    """Run the first forwards of a pass, eagerly, and return what the profiler wrote about them.

    One forward runs unrecorded before.
    """

    def forward(index: int) -> None:
        impl.before(index)
        impl.meet()
        with torch.profiler.record_function(f"forward {index}"):
            impl.step(index)
        impl.after(index)

    impl.restore()
    forward(0)
    impl.restore()
    synchronize()
    title = torch.profiler.record_function(f"{scenario.name} / {impl.name}")
    with torch.profiler.profile(activities=activities(impl.setting.device)) as profiler, title:
        for index in range(min(scenario.steps, TRACE_FORWARDS)):
            forward(index)
        synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        made: dict[str, Any] = json.loads(file.read_bytes(), strict=False)  # for names with odd characters
    return made


def activities(device: torch.device) -> list[Any]:
    """Return what the profiler can record of this device and its host."""
    host = torch.profiler.ProfilerActivity.CPU
    supported = sorted(torch.profiler.supported_activities(), key=str)
    return [activity for activity in supported if activity == host or device.type != "cpu"]
