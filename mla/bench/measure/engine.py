"""Time implementations against each other, fairly, and check what was timed.

Per scenario, every implementation runs one whole pass, which is compared with the oracle; wrong ones are not
timed. The same goes for every further variant (graph replay, cold cache, device clock) of correct ones. After
the warm-up, passes of all variants are interleaved in a seeded random order, each starting from the restored
history. The outputs of a variant's last pass are compared with the oracle again, right after it. An
implementation with a wrong variant gets no numbers at all.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from mla.bench.measure import refusals
from mla.bench.measure.device_state import read_sensors
from mla.bench.measure.hooks import Hooks
from mla.bench.measure.passes import PassRunner
from mla.bench.measure.samples import Measurement, Samples
from mla.bench.measure.setup import Setup
from mla.bench.measure.transient_memory import TransientBytes
from mla.bench.measure.variants import HEADLINE, Variants
from mla.bench.measure.warmup import warm_up
from mla.bench.subjects.base import Implementation
from mla.bench.workload.scenario import Scenario
from mla.verify.verdict import Check
from mla_backends.api import Backend

ProgressCallback = Callable[[str, int], None]  # what is running, forwards done since the last call


def measure(
    implementations: Sequence[Implementation],
    scenario: Scenario,
    inputs: Any,
    checker: Any,
    backend: Backend,
    seed: int,
    variants: Variants | None = None,
    progress: ProgressCallback = lambda what, done: None,
    hooks: Hooks = Hooks(),  # noqa: B008  # immutable
) -> dict[str, Measurement]:
    """Return implementation name -> measurement.

    `inputs` and `checker` are what the implementations are loaded and checked with. An interrupt or
    `hooks.should_stop` ends timing early; complete passes are kept. What an op refuses costs its own
    implementation its numbers, and no other. Raises `VariantError` if graphs are
    required and the first implementation has none.
    """
    engine = _Engine(scenario, checker, backend, progress, hooks)
    try:
        for one in implementations:
            hooks.enter(one.name)
            with engine.refusable(one):
                one.load(scenario, inputs)
                engine.run_and_check(one)
        runners = engine.make_runners(implementations, Setup(backend, variants or Variants(), scenario))
        engine.warm_up(runners)
        engine.time(runners, random.Random(seed))
    except KeyboardInterrupt:
        engine.interrupt(implementations)
    return engine.measurements


class _Engine:
    """The measurement of one scenario."""

    def __init__(
        self, scenario: Scenario, checker: Any, backend: Backend, progress: ProgressCallback, hooks: Hooks
    ) -> None:
        self.measurements: dict[str, Measurement] = {}
        self._scenario, self._checker, self._backend = scenario, checker, backend
        self._progress, self._hooks = progress, hooks

    def _tick(self, doing: str, one: Implementation, count: int = 1) -> None:
        self._progress(f"{self._scenario.name}: {doing} {one.name}", count)

    def _correct(self, runner: PassRunner) -> bool:
        return self.measurements[runner.implementation.name].check.status == "ok"

    @contextmanager
    def refusable(self, one: Implementation) -> Iterator[None]:
        """Record what an op refuses inside the `with` block: the implementation was not run."""
        try:
            yield
        except Exception as error:  # all others are raised again
            reason = refusals.reason(error, one.name)
            if not reason:
                raise
            check = Check(status="not run", reason=reason)
            self.measurements[one.name] = Measurement(Samples(HEADLINE, check), refused=True)

    # ------------------------------------------------------------------------------------------ before

    def run_and_check(self, one: Implementation) -> None:
        """Run a whole pass, untimed; the transient memory of the last forward, the longest, is counted."""
        transient = TransientBytes()
        for index in range(self._scenario.inputs):
            one.before(index)
            with transient if index == self._scenario.inputs - 1 else nullcontext():
                one.step(index)
            one.after(index)
            self._tick("checking", one)
        check = one.check(self._checker)
        transient_bytes = transient.peak + one.scratch_bytes()
        headline = Samples(HEADLINE, check)
        self.measurements[one.name] = Measurement(headline, transient_bytes=transient_bytes)
        if check.status == "wrong":
            self._hooks.failed(one, check)

    def make_runners(self, implementations: Sequence[Implementation], setup: Setup) -> list[PassRunner]:
        """Return the runners of all correct implementations, each variant checked before it is timed."""
        found = []
        for position, one in enumerate(implementations):
            self._hooks.enter(one.name)
            if self.measurements[one.name].check.status == "ok":
                with self.refusable(one):
                    found += setup.runners(one, self.measurements[one.name], first=position == 0)
        for runner in found:
            if runner.samples.variant != HEADLINE and self._correct(runner):
                self._hooks.enter(runner.implementation.name)
                with self.refusable(runner.implementation):
                    runner.try_pass(self._hooks.heartbeat)
                    self._tick("checking", runner.implementation, len(runner.steps.run))
                    runner.samples.check = runner.implementation.check(self._checker)
        return [runner for runner in found if self._correct(runner)]

    def warm_up(self, runners: Sequence[PassRunner]) -> None:
        """Warm up every mode, timed separately; the result reports the headline's warm-up."""
        for runner in runners:
            variant, one = runner.samples.variant, runner.implementation
            if variant.cache == "cold" or variant.clock == "device":
                continue  # the checked pass is warm-up enough: caches are flushed, or warm already
            self._hooks.enter(one.name)
            with self.refusable(one):
                self._warm_up(runner)

    def _warm_up(self, runner: PassRunner) -> None:
        one = runner.implementation
        tick = partial(self._tick, "warming up", one)
        timer, least = self._backend.timer(), self._scenario.warmups
        done = warm_up(runner.forwards, self._scenario.steps, least, timer, tick)
        if runner.samples.variant == HEADLINE:
            measurement = self.measurements[one.name]
            measurement.warmups, measurement.settled = done.forwards, done.settled

    # ------------------------------------------------------------------------------------------ timing

    def time(self, runners: Sequence[PassRunner], order: random.Random) -> None:
        """Time all passes, between two readings of the device's sensors."""
        self._sense("before")
        with _no_garbage_collection():
            self._time_passes(runners, order)
        self._sense("after")

    def _sense(self, when: str) -> None:
        state = read_sensors(self._backend, when)
        for measurement in self.measurements.values():
            measurement.device_state += [dict(one) for one in state]

    def _time_passes(self, runners: Sequence[PassRunner], order: random.Random) -> None:
        previous = None
        rounds = self._scenario.rounds
        for index in range(rounds):
            due = [runner for runner in runners if runner.steps.due(index, rounds)]
            order.shuffle(due)
            for runner in due:
                if self._hooks.should_stop is not None and self._hooks.should_stop():
                    return
                if not self._correct(runner):
                    continue
                with self.refusable(runner.implementation):
                    self._time_pass(runner, switched=runner is not previous)
                previous = runner

    def _time_pass(self, runner: PassRunner, switched: bool) -> None:
        self._hooks.enter(runner.implementation.name)
        if switched:
            runner.rewarm()
        runner.samples.passes.append(runner.time_pass(self._hooks.heartbeat))
        runner.samples.after_switch.append(switched)
        self._tick("timing", runner.implementation, len(runner.steps.run))
        if runner.complete or self._hooks.should_stop is not None:  # any pass may be the last
            self._check_again(runner)

    def _check_again(self, runner: PassRunner) -> None:
        """Check the outputs of the last pass; an implementation that is wrong now loses its numbers."""
        first, again = runner.samples.check, runner.implementation.check(self._checker)
        runner.samples.checked_again = True
        if again.status != "ok":
            again.reason = f"correct before timing, wrong after it: {again.reason}"
        if again.status != "ok" or (again.error_ratio or 0) >= (first.error_ratio or 0):
            runner.samples.check = again
        if again.status != "ok":
            self.measurements[runner.implementation.name].discard()
            self._hooks.failed(runner.implementation, again)

    def interrupt(self, implementations: Sequence[Implementation]) -> None:
        """Mark what an interrupt left undone, including implementations that had not started."""
        for one in implementations:
            not_run = Samples(HEADLINE, Check(status="not run", reason="interrupted"))
            self.measurements.setdefault(one.name, Measurement(not_run)).interrupt()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Disable Python's garbage collector inside the `with` block."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
