"""Time implementations against each other, fairly, and check what was timed.

Per scenario: every implementation runs one whole pass, which is compared with the oracle; those that are
wrong are not timed. So does every further lane (graph replay, cold cache, device clock) of those that are
right. After warming up, passes of all lanes alternate in seeded random order, each from the restored history.
The outputs that a lane's last pass leaves are compared with the oracle again, right after it. An
implementation with a wrong lane gets no number at all.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from mla.bench.measure.device_state import read_sensors
from mla.bench.measure.hooks import Pace
from mla.bench.measure.passes import Lane
from mla.bench.measure.samples import Measured, Series
from mla.bench.measure.setup import Equipment
from mla.bench.measure.transient_memory import TransientBytes
from mla.bench.measure.variants import HEADLINE, Lanes
from mla.bench.measure.warmup import warm_up
from mla.bench.subjects.base import Implementation
from mla.bench.workload.scenario import Scenario
from mla.verify.verdict import Check
from mla_backends.api import Backend

Progress = Callable[[str, int], None]  # what is running, forwards done since the last call


def measure(
    implementations: Sequence[Implementation],
    scenario: Scenario,
    inputs: Any,
    checker: Any,
    backend: Backend,
    seed: int,
    lanes: Lanes | None = None,
    progress: Progress = lambda what, done: None,
    pace: Pace = Pace(),  # noqa: B008  # immutable
) -> dict[str, Measured]:
    """Return name -> measurement. An interrupt or `pace` ends timing early; complete passes are kept.

    `inputs` and `checker` are what the implementations load and are checked with.
    Raises `LaneError` when graphs were asked for by name and the first implementation has none.
    """
    work = _Work(scenario, checker, backend, progress, pace)
    try:
        for one in implementations:
            pace.enter(one.name)
            one.load(scenario, inputs)
            work.run_and_check(one)
        equipment = Equipment(backend, lanes or Lanes(), scenario)
        ready = work.make_lanes(implementations, equipment)
        work.warm_up(ready)
        work.time(ready, random.Random(seed))
    except KeyboardInterrupt:
        work.interrupt(implementations)
    return work.measured


class _Work:
    """One scenario while it is measured."""

    def __init__(
        self, scenario: Scenario, checker: Any, backend: Backend, progress: Progress, pace: Pace
    ) -> None:
        self.measured: dict[str, Measured] = {}
        self._scenario, self._checker, self._backend = scenario, checker, backend
        self._progress, self._pace = progress, pace

    def _tick(self, doing: str, one: Implementation, count: int = 1) -> None:
        self._progress(f"{self._scenario.name}: {doing} {one.name}", count)

    def _right(self, lane: Lane) -> bool:
        return self.measured[lane.implementation.name].check.status == "ok"

    # ------------------------------------------------------------------------------------------ before

    def run_and_check(self, one: Implementation) -> None:
        """Run a whole pass, untimed; the last forward, the longest, has its memory counted."""
        transient = TransientBytes()
        for index in range(self._scenario.inputs):
            one.before(index)
            with transient if index == self._scenario.inputs - 1 else nullcontext():
                one.step(index)
            one.after(index)
            self._tick("checking", one)
        check = one.check(self._checker)
        transient_bytes = transient.peak + one.scratch_bytes()
        self.measured[one.name] = Measured(Series(HEADLINE, check), transient_bytes=transient_bytes)

    def make_lanes(self, implementations: Sequence[Implementation], equipment: Equipment) -> list[Lane]:
        """Return the lanes of all that are right, each checked in its own mode before it is timed."""
        found = []
        for place, one in enumerate(implementations):
            self._pace.enter(one.name)
            if self.measured[one.name].check.status == "ok":
                found += equipment.lanes(one, self.measured[one.name], first=place == 0)
        for lane in found:
            if lane.series.kind != HEADLINE and self._right(lane):
                self._pace.enter(lane.implementation.name)
                lane.try_pass(self._pace.beat)
                self._tick("checking", lane.implementation, len(lane.steps.run))
                lane.series.check = lane.implementation.check(self._checker)
        return [lane for lane in found if self._right(lane)]

    def warm_up(self, lanes: Sequence[Lane]) -> None:
        """Warm up every mode on a clock of its own; what the headline needed goes into the result."""
        for lane in lanes:
            kind, one = lane.series.kind, lane.implementation
            if kind.cache == "cold" or kind.clock == "device":
                continue  # the pass that was checked is enough where caches are swept, or warm already
            self._pace.enter(one.name)
            tick = partial(self._tick, "warming up", one)
            timer, least = self._backend.timer(), self._scenario.warmups
            warmth = warm_up(lane.forwards, self._scenario.steps, least, timer, tick)
            if kind == HEADLINE:
                measured = self.measured[one.name]
                measured.warmups, measured.settled = warmth.forwards, warmth.settled

    # ------------------------------------------------------------------------------------------ timing

    def time(self, lanes: Sequence[Lane], order: random.Random) -> None:
        """Time all passes, between two readings of the device's sensors."""
        self._sense("before")
        with _no_garbage_collection():
            self._time_passes(lanes, order)
        self._sense("after")

    def _sense(self, when: str) -> None:
        state = read_sensors(self._backend, when)
        for measured in self.measured.values():
            measured.device_state += [dict(one) for one in state]

    def _time_passes(self, lanes: Sequence[Lane], order: random.Random) -> None:
        previous = None
        turns = self._scenario.turns
        for turn in range(turns):
            due = [lane for lane in lanes if lane.steps.due(turn, turns)]
            order.shuffle(due)
            for lane in due:
                if self._pace.over is not None and self._pace.over():
                    return
                if self._right(lane):
                    self._time_pass(lane, switched=lane is not previous)
                    previous = lane

    def _time_pass(self, lane: Lane, switched: bool) -> None:
        self._pace.enter(lane.implementation.name)
        if switched:
            lane.rewarm()
        lane.series.passes.append(lane.time_pass(self._pace.beat))
        lane.series.after_switch.append(switched)
        self._tick("timing", lane.implementation, len(lane.steps.run))
        if lane.complete or self._pace.over is not None:  # any pass may be the last
            self._check_again(lane)

    def _check_again(self, lane: Lane) -> None:
        """Check the outputs of a lane's last pass; an implementation that is wrong now loses its numbers."""
        first, again = lane.series.check, lane.implementation.check(self._checker)
        lane.series.checked_again = True
        if again.status != "ok":
            again.reason = f"right before timing and wrong after it: {again.reason}"
        if again.status != "ok" or (again.error_ratio or 0) >= (first.error_ratio or 0):
            lane.series.check = again
        if again.status != "ok":
            self.measured[lane.implementation.name].refuse()

    def interrupt(self, implementations: Sequence[Implementation]) -> None:
        """Mark what an interrupt left undone, also of implementations that had not begun."""
        for one in implementations:
            not_run = Series(HEADLINE, Check(status="not run", reason="interrupted"))
            self.measured.setdefault(one.name, Measured(not_run)).interrupt()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep Python's collector out of the timed region."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
