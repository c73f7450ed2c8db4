"""Where a forward's time goes: every op timed alone, in passes of their own after the headline's.

Between two ops the device is synchronized, which a forward does without; so the parts add up to more than it.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mla.bench.limits.roofline import RooflineModel
from mla.bench.results.schema import Case, Cost, Roofline, Stage
from mla.bench.subjects.layer import MlaLayer
from mla.bench.workload.scenario import Scenario
from mla.cost.by_role import role_costs
from mla.verify.layer_check import Checker
from mla_backends.api import Timer

#: Forwards that are timed at least: whole passes, so that a growing cache counts as it does in the headline.
FORWARDS = 20
BETWEEN = "between ops"

#: Stage -> what belongs to it: roles of `mla.layer.ops`, `gather` (context latents, and keys made of them),
#: `extend` and `plan`, and the layer's own host code and copies between them.
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

#: Milliseconds of one forward, by part.
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
        """Time what happens inside the `with` block, other regions excepted."""
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


class _TimedOp:
    """An op whose calls are timed and which is itself in every other way."""

    def __init__(self, op: Any, call: Callable[..., Any]) -> None:
        self._op, self._call = op, call

    def __call__(self, *args: Any, **tensors: Any) -> None:
        self._call(*args, **tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._op, name)


@contextmanager
def instrumented(one: MlaLayer, watch: Stopwatch) -> Iterator[None]:
    """Time the layer's ops, its planning and its cache's `extend` inside the `with` block only."""
    layer, ops = one.layer, one.layer.ops
    parts = ((layer, "plan", "plan"), (layer.expanded, "expand", "gather"), (one.cache, "extend", "extend"))
    layer.ops = ops.replaced(lambda role, op: _TimedOp(op, watch.wrap(role, op)))
    for owner, attribute, name in parts:
        setattr(owner, attribute, watch.wrap(name, getattr(owner, attribute)))
    try:
        yield
    finally:
        layer.ops = ops
        for owner, attribute, _ in parts:
            delattr(owner, attribute)  # the class's own shows again


def total_forwards(scenario: Scenario) -> int:
    """Return how many forwards are timed: whole passes, each prefill being one."""
    return scenario.inputs * -(-FORWARDS // scenario.inputs)


def time_forwards(
    one: MlaLayer, scenario: Scenario, timer: Timer, progress: Callable[[str, int], None]
) -> list[Sample]:
    """Run the passes and return a sample per forward; the last pass leaves its outputs."""
    watch = Stopwatch(timer)
    samples: list[Sample] = []
    gc.collect()
    gc.disable()
    try:
        with instrumented(one, watch):
            while len(samples) < FORWARDS:
                one.restore()  # plans the batch of a prefill
                one.outputs.fill_(float("nan"))
                for index in range(scenario.inputs):
                    with watch.region(BETWEEN):
                        one.step(index)
                    samples.append(watch.take())
                progress(f"{scenario.name}: stages of {one.name}", scenario.inputs)
    finally:
        gc.enable()
    return samples


def add(
    case: Case,
    one: MlaLayer,
    scenario: Scenario,
    checker: Checker,
    ceilings: RooflineModel,
    progress: Callable[[str, int], None],
) -> None:
    """Fill `case.stages`. A case that is wrong when it is instrumented loses its numbers."""
    try:
        samples = time_forwards(one, scenario, one.setting.backend.timer(), progress)
    except KeyboardInterrupt:
        case.interrupted = True
        return
    check = one.check(checker)
    if check.status == "ok":
        case.stages = summary(samples, costs(one, scenario), ceilings, case.cost.bytes)
        return
    check.reason = f"right in timed passes and wrong when its stages were timed: {check.reason}"
    case.check, case.roofline = check, Roofline()
    case.latency_ms = case.tokens_per_s = None


def costs(one: MlaLayer, scenario: Scenario) -> dict[str, Cost]:
    """Return role -> its work, averaged over the forwards of a pass."""
    setting, total = one.setting, dict[str, list[int]]()
    for step in range(scenario.inputs):
        lengths, size = (scenario.query_lens, scenario.kv_lens(step)), setting.dtype.itemsize
        for role, work in role_costs(setting.config, *lengths, size, setting.attention).items():
            old = total.get(role, [0, 0])
            total[role] = [old[0] + work.flops, old[1] + work.bytes]
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
