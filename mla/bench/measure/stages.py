"""Where a forward's time goes: every op timed alone, in separate passes after the headline's.

The device is synchronized between two ops, which a forward is not, so the parts add up to more than it takes.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from mla.bench.limits.roofline import RooflineModel
from mla.bench.results.schema import Case, Cost, Roofline, Stage
from mla.bench.subjects.base import LayerChecker
from mla.bench.subjects.layer import MlaLayer
from mla.bench.workload.scenario import Scenario
from mla.cache.ragged_batch import RaggedBatch
from mla.cost import Work
from mla.cost.by_role import role_costs
from mla.verify.verdict import Check
from mla_backends.api import HostTimer, Timer

# Minimum of timed forwards: whole passes, so that a growing cache counts as it does in the headline.
FORWARDS = 20
BETWEEN = "between ops"
# Numbers of the passes, which select their inputs.
PASSES = 1 << 22

# Stage -> its parts: roles of `mla.layer.ops`, `gather` (context latents, and keys made of them),
# `extend` and `plan`, and the layer's own host code and copies between them.
STAGES = {
    "query and latent projections": ("qkv_a_proj", "q_a_layernorm", "q_b_proj"),
    "cache write": ("write_latent",),
    "attention": (
        *("w_uk", "rotate_query", "latent_attention", "w_uv"),
        *("kv_b_proj", "gather", "expanded_attention"),
    ),
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
        """Time the `with` block, excluding other regions inside it."""
        if self._open:
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

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` as a region of its own."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.region(name):
                return function(*args, **kwargs)

        return timed

    def _stop(self) -> None:
        name = self._open[-1]
        self._times[name] = self._times.get(name, 0.0) + self._timer.stop()


class TimedSteps:
    """The passes of a layer with every part of a step in a region of its own.

    Drives the parts of the layer and of its cache itself, so that both stay as they are.
    """

    def __init__(self, one: MlaLayer, scenario: Scenario, watch: Stopwatch) -> None:
        self._one, self._watch, self._prefill = one, watch, scenario.mode == "prefill"
        layer, step = one.layer, one.layer.step
        expanded = replace(step.expanded, rebuild=watch.wrap("gather", step.expanded.rebuild))
        self._step = replace(step, expanded=expanded)
        self._ops = layer.ops.replaced(watch.wrap)
        self._extend, self._plan = watch.wrap("extend", one.extend), watch.wrap("plan", layer.plan)

    def restore(self, number: int = 0) -> None:
        """Put the cache back to the history and prepare the batch of a prefill, as the layer itself does."""
        self._one.rewind(number)
        if self._prefill:
            self._batch = self._one.batch = self._extend()
            self._plan(self._batch)

    def step(self, index: int) -> None:
        """Run one forward, and write its output where the layer would."""
        with self._watch.region(BETWEEN), torch.no_grad():
            self._forward(index, self._batch if self._prefill else self._extend())

    def _forward(self, index: int, batch: RaggedBatch) -> None:
        one = self._one
        hidden, pages, out = one.x, one.cache.pages[0], one.out
        one.layer.check(hidden, batch, pages, out)
        self._step.run(self._ops, hidden, batch, self._plan(batch), pages, out)


def total_forwards(scenario: Scenario) -> int:
    """Return how many forwards are timed: whole passes, each prefill being one."""
    return scenario.inputs * -(-FORWARDS // scenario.inputs)


def time_forwards(
    one: MlaLayer,
    scenario: Scenario,
    timer: Timer,
    progress: Callable[[str, int], None],
    check: Callable[[], Check],
) -> tuple[list[Sample], Check]:
    """Run the passes; return a sample per forward, and the check of the last pass or the first wrong one."""
    watch = Stopwatch(timer)
    steps = TimedSteps(one, scenario, watch)
    samples: list[Sample] = []
    found = Check(status="ok")
    gc.collect()
    gc.disable()
    try:
        while len(samples) < FORWARDS and found.status == "ok":
            steps.restore(PASSES + len(samples))  # inputs that no other pass had
            for index in range(scenario.inputs):
                one.before(index)
                steps.step(index)
                one.after(index)
                samples.append(watch.take())
            found = check()
            progress(f"{scenario.name}: stages of {one.name}", scenario.inputs)
    finally:
        gc.enable()
    return samples, found


def add(
    case: Case,
    one: MlaLayer,
    scenario: Scenario,
    checker: LayerChecker,
    ceilings: RooflineModel,
    progress: Callable[[str, int], None],
) -> None:
    """Fill `case.stages`. A case that is wrong in these passes loses its numbers."""
    try:
        timer = HostTimer(one.setting.backend.synchronize)
        samples, check = time_forwards(one, scenario, timer, progress, lambda: one.check(checker))
    except KeyboardInterrupt:
        case.interrupted = True
        return
    if check.status == "ok":
        case.stages = summary(samples, costs(one, scenario), ceilings, case.cost.bytes)
        return
    check.reason = f"right in timed passes and wrong when its stages were timed: {check.reason}"
    case.check, case.roofline = check, Roofline()
    case.latency_ms = case.tokens_per_s = None


def costs(one: MlaLayer, scenario: Scenario) -> dict[str, Cost]:
    """Return role -> its work, averaged over the forwards of a pass."""
    setting, total = one.setting, dict[str, Work]()
    for step in range(scenario.inputs):
        lengths, size = (scenario.query_lens, scenario.kv_lens(step)), setting.dtype.itemsize
        for role, work in role_costs(setting.config, *lengths, size, setting.attention).items():
            total[role] = total.get(role, Work()) + work
    count = scenario.inputs
    return {role: Cost(flops=round(f / count), bytes=round(b / count)) for role, (f, b) in total.items()}


def summary(
    samples: Sequence[Sample], costs: dict[str, Cost], ceilings: RooflineModel, footprint: int
) -> list[Stage]:
    """Return a row per stage that ran and, where it has several parts, one for each: "stage: part"."""
    rows = []
    for name, parts in STAGES.items():
        ran = [part for part in parts if any(part in sample for sample in samples)]
        rows += [(name, ran)] if ran else []
        rows += [(f"{name}: {part}", [part]) for part in ran if len(ran) > 1]
    return [_stage(name, parts, samples, costs, ceilings, footprint) for name, parts in rows]


def _stage(
    name: str,
    parts: Sequence[str],
    samples: Sequence[Sample],
    costs: dict[str, Cost],
    ceilings: RooflineModel,
    footprint: int,
) -> Stage:
    ms = statistics.median(sum(sample.get(part, 0.0) for part in parts) for sample in samples)
    known = [costs[part] for part in parts if part in costs]
    if not known:
        return Stage(name=name, ms=ms)
    cost = Cost(flops=sum(one.flops for one in known), bytes=sum(one.bytes for one in known))
    return Stage(name=name, ms=ms, cost=cost, roofline=ceilings.roofline(cost, ms, footprint) if ms else None)
