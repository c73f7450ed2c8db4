"""Time implementations against each other, fairly, and check what was timed.

Per scenario, every implementation warms up and then runs one whole pass, which is compared with the oracle;
wrong ones are not timed. The same goes for every further variant (graph replay, cold cache, device clock) of
correct ones. Then passes of all variants are interleaved in a seeded random order, each starting from the
restored history and with inputs of its own. The outputs of every pass are compared with the oracle, right
after it. An implementation with a wrong variant gets no numbers at all, nor does one whose times are
contradicted.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count, pairwise
from statistics import median
from typing import Any

from mla.bench.limits.growth import no_garbage_collection
from mla.bench.measure import evidence, new_lengths
from mla.bench.measure import hooks as refusals
from mla.bench.measure.hooks import Hooks
from mla.bench.measure.passes import PassRunner, warm_up
from mla.bench.measure.samples import Measurement, Samples, TransientBytes, read_sensors
from mla.bench.measure.setup import Setup
from mla.bench.measure.target import FEWEST, NO_TIME, Timetable
from mla.bench.measure.variants import HEADLINE, Variants
from mla.bench.subjects.base import Implementation
from mla.bench.subjects.layer import MlaLayer
from mla.bench.workload.scenario import Scenario
from mla.verify.verdict import Check
from mla_backends.api import Backend

# Numbers of the pass that is checked first, and of passes that are not timed: no timed pass has them.
CHECKED, UNTIMED = 1 << 20, 1 << 21

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
    `hooks.should_stop` ends it early; complete passes are kept. What an op refuses costs its own
    implementation its numbers, and no other. Raises `VariantError` if graphs are
    required and the first implementation has none.
    """
    setup = Setup(backend, variants or Variants(), scenario)
    names = [one.name for one in implementations]
    engine = _Engine(scenario, inputs, checker, setup, backend, progress, hooks, names)
    gc.collect()
    with no_garbage_collection():  # the same for checks and timing: no op can tell them apart by it
        try:
            for one in implementations:
                hooks.enter(one.name)
                with engine.refusable(one):
                    engine.load_and_check(one)
            runners = engine.make_runners(implementations)
            engine.warm_up(runners)
            engine.time(runners, random.Random(seed))
            engine.examine(runners)
        except KeyboardInterrupt:
            engine.interrupt(implementations)
    return engine.measurements


class _Engine:
    """The measurement of one scenario."""

    def __init__(
        self,
        scenario: Scenario,
        inputs: Any,
        checker: Any,
        setup: Setup,
        backend: Backend,
        progress: ProgressCallback,
        hooks: Hooks,
        names: Sequence[str],
    ) -> None:
        self.measurements: dict[str, Measurement] = {}
        self._headlines: dict[str, PassRunner] = {}
        self._scenario, self._inputs, self._checker = scenario, inputs, checker
        self._setup, self._backend = setup, backend
        self._progress, self._hooks = progress, hooks
        self._first, self._unplanned = hooks.first or names[0], len(names)  # whose passes are not planned yet
        prefill, asked = scenario.mode == "prefill", setup.asked
        self._times = Timetable(hooks.target, prefill, asked, self._first, self._correct)
        self._runners: Sequence[PassRunner] = ()  # once they are timed
        self._untimed = count(UNTIMED)  # numbers of passes that are not timed
        self._unseen: evidence.Unseen | None = None

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

    def _too_long(self, seconds: float, what: str) -> str:
        """Return why something does not fit before the first implementation's pass and evidence, or ""."""
        return self._hooks.should_stop(seconds + self._times.promised() + self._hooks.oracle, what)

    def load_and_check(self, one: Implementation) -> None:
        """Warm up and run a whole pass, untimed; the transient memory of the last forward is counted."""
        found = self.measurements[one.name] = Measurement(Samples(HEADLINE, Check(status="not run")))
        if reason := self._too_long(0.0, "loading and checks"):
            found.headline.check.reason = reason
            return
        one.load(self._scenario, self._inputs)
        runner = self._headlines[one.name] = self._setup.headline(one, found)
        self._warm_up(runner)
        self._shorten(runner)
        self._times.headlines.append(runner)
        forwards = min(self._scenario.inputs, len(runner.steps.run)) + len(runner.steps.run)
        whole = forwards * self._times.each.get(runner, 0.0)
        if reason := self._too_long(whole, "checks and one timed pass"):
            found.headline.check = Check(status="not run", reason=reason)
            return
        start = self._hooks.target.now()
        found.transient_bytes = self._whole_pass(runner)
        each = (self._hooks.target.now() - start) / self._scenario.inputs
        self._times.each.setdefault(runner, each)  # without a warm-up
        found.headline.check = one.check(self._checker)
        if found.check.status == "ok":
            found.outputs = one.outputs()
        else:
            self._hooks.failed(one, found.check)

    def _whole_pass(self, runner: PassRunner) -> int:
        """Run a pass, and of a prefill one forward; return the transient bytes of the last, the longest."""
        one, transient = runner.implementation, TransientBytes()
        indices = runner.steps.run[: self._scenario.inputs]
        one.restore(CHECKED)
        for index in indices:
            one.before(index)
            one.meet()
            with transient if index == indices[-1] else nullcontext():
                one.step(index)
            one.after(index)
            self._tick("checking", one)
        one.outputs()
        return transient.peak + one.facts().scratch_bytes

    def _shorten(self, runner: PassRunner) -> None:
        """Let a yardstick run less that is much slower than the first implementation, or for lack of time.

        Its own fastest forward counts, and the median of others: a disturbance makes it no slower.
        """
        name = runner.implementation.name
        right = {n: one for n, one in self.measurements.items() if one.check.status in ("ok", "not run")}
        warm = {n: one for n, one in right.items() if one.warm_ms}  # its own check follows
        ms = {n: (one.warm_ms if n == name else one.typical_ms) or 0.0 for n, one in warm.items()}
        most, self._unplanned = self._times.forwards(runner, self._unplanned), self._unplanned - 1
        if name in (less := self._hooks.shorten(ms, most)):
            runner.steps, reason = less[name]
            self.measurements[name].due = runner.steps.passes
            self._hooks.detail(f"{self._scenario.name}, {name}: {reason}")

    def make_runners(self, implementations: Sequence[Implementation]) -> list[PassRunner]:
        """Return the runners of all correct implementations, each variant checked before it is timed."""
        self._hooks.target.begun()
        found = []
        for one in implementations:
            self._hooks.enter(one.name)
            measurement = self.measurements[one.name]
            if measurement.check.status == "ok":
                found.append(self._headlines[one.name])
                if measurement.due is None:
                    with self.refusable(one):
                        found += self._setup.others(one, measurement, one.name == self._first)
        for runner in found:
            if runner.samples.variant != HEADLINE and self._correct(runner):
                self._hooks.enter(runner.implementation.name)
                with self.refusable(runner.implementation):
                    self._check_variant(runner)
        return [one for one in found if self._correct(one) and one.samples.check.status == "ok"]

    def _check_variant(self, runner: PassRunner) -> None:
        one, start = runner.implementation, self._hooks.target.now()
        left_out = Check(status="not run", reason=NO_TIME)
        if not self._times.variant_fits(runner, self._times.each[self._headlines[one.name]]):
            runner.samples.check = left_out
            return
        seconds = 2 * self._times.each[self._headlines[one.name]] * len(runner.steps.run)
        if reason := self._too_long(seconds, "its check"):
            runner.samples.check = Check(status="not run", reason=reason)
            return
        runner.run(next(self._untimed), self._hooks.heartbeat)
        self._tick("checking", one, len(runner.steps.run))
        runner.samples.check = one.check(self._checker)
        self._times.taken[runner] = [self._hooks.target.now() - start]
        if runner.samples.check.status != "ok":
            self._hooks.failed(one, runner.samples.check)
        elif not self._times.variant_fits(runner, 0.0):
            runner.samples.check = left_out
        else:
            self._times.variants.append(runner)

    def warm_up(self, runners: Sequence[PassRunner]) -> None:
        """Warm up every further mode as well, timed separately."""
        for runner in runners:
            variant, one = runner.samples.variant, runner.implementation
            if variant == HEADLINE or variant.cache == "cold" or variant.clock == "device":
                continue  # the checked pass is warm-up enough: caches are flushed, or warm already
            self._hooks.enter(one.name)
            with self.refusable(one):
                self._warm_up(runner)

    def _warm_up(self, runner: PassRunner) -> None:
        one, ends = runner.implementation, list[float]()

        def tick(count: int) -> None:
            ends.append(self._hooks.target.now())
            self._tick("warming up", one, count)

        steps, least = self._scenario.steps, self._scenario.warmups
        must = min(least, self._hooks.warmups)
        done = warm_up(runner.forwards, steps, least, runner.time_step, self._untimed, tick, must)
        runner.ms = done.ms or 0.0
        if runner.samples.variant == HEADLINE:
            found = self.measurements[one.name]
            found.warmups, found.settled = done.forwards, done.settled
            found.warm_ms, found.typical_ms = done.ms, done.typical_ms
            if len(ends) > 1:
                self._times.each[runner] = median(after - before for before, after in pairwise(ends))

    # ------------------------------------------------------------------------------------------ timing

    def time(self, runners: Sequence[PassRunner], order: random.Random) -> None:
        """Time all passes, between two readings of the device's sensors."""
        self._runners = runners
        if self._too_long(0.0, "a timed pass"):
            return
        self._draw_unseen(runners)
        self._hooks.target.checked()
        self._sense("before")
        self._time_passes(runners, order)
        self._say_cut()
        self._sense("after")

    def _draw_unseen(self, runners: Sequence[PassRunner]) -> None:
        """Make the inputs of the evidence and their oracle, before time is shared out among the passes."""
        if not runners or not hasattr(self._checker, "of"):  # of one op operands change from call to call
            return
        prefill = self._scenario.mode == "prefill"
        count = max(evidence.forwards(runner.steps, prefill) for runner in runners)
        self._progress(f"{self._scenario.name}: drawing inputs that nothing has seen", 0)
        with self._spared():
            self._unseen = evidence.Unseen(self._inputs, self._checker, count)
        self._hooks.heartbeat()

    @contextmanager
    def _spared(self, one: Implementation | None = None) -> Iterator[None]:
        """Let lack of memory cost evidence, and no finished number; `one` gets the inputs of its passes back.

        Layers over ranks are gone by then, on all of them.
        """
        try:
            yield
        except Exception as error:  # all others are raised again
            if not refusals.too_large(error) or (one is not None and one.setting.ranks is not None):
                raise
            self._unseen = None
            said = "memory is short: times are not held against forwards on inputs that nothing has seen"
            self._hooks.say(f"{self._scenario.name}: {said}")
            if one is not None:
                one.load(self._scenario, self._inputs)

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
                promised = 0.0 if runner in self._times.first() else self._times.promised()
                if self._hooks.should_stop(self._times.ending(runner) + promised, "another pass"):
                    if promised:
                        continue
                    return
                if not self._correct(runner) or not self._times.another(runner):
                    continue
                with self.refusable(runner.implementation):
                    self._time_pass(runner, switched=runner is not previous)
                previous = runner

    def _say_cut(self) -> None:
        """Say what has fewer passes than were due; a headline is complete with those."""
        for runner, before in self._times.cut.items():
            name, done, due = runner.implementation.name, len(runner.passes), runner.steps.passes
            if not done:  # no headline: each has one
                runner.samples.check = Check(status="not run", reason=NO_TIME)
            elif self._correct(runner):
                what = ", ".join(part for part in (name, runner.samples.variant.kind) if part)
                few = ", too few for an interval" if done < FEWEST else ""
                said = f"{what}: {done} of {due} passes fit into a scenario's time{few}"
                self._hooks.say(f"{self._scenario.name}, {said}; give --passes or --runs to time them all")
            if runner.headline and self._correct(runner):
                self.measurements[name].due = done
                self._say_alone(runner, before)

    def _say_alone(self, cut: PassRunner, before: int) -> None:
        """Say how many passes of the first implementation ran without one that was cut."""
        for first in self._times.first():
            alone = len(first.passes) - before
            if first is not cut and alone and self._correct(first):
                said = f"the last {alone} passes of {first.implementation.name} ran without it"
                self._hooks.say(f"{self._scenario.name}, {cut.implementation.name}: {said}")

    def _time_pass(self, runner: PassRunner, switched: bool) -> None:
        self._hooks.enter(runner.implementation.name)
        start = self._hooks.target.now()
        runner.time(self._number(runner), next(self._untimed), self._hooks.heartbeat)
        runner.samples.after_switch.append(switched)
        of = f"pass {len(runner.passes)} of {runner.steps.passes} of"
        self._tick(f"timing {of}", runner.implementation, len(runner.steps.run))
        self._check_pass(runner)
        self._times.taken.setdefault(runner, []).append(self._hooks.target.now() - start)

    def _number(self, runner: PassRunner) -> int:
        """Return the number of a variant's next pass: inputs are the same for all implementations."""
        variants = [one.variant for one in self.measurements[runner.implementation.name].samples]
        place = variants.index(runner.samples.variant)
        return 1 + place * self._scenario.rounds + len(runner.passes)

    def _check_pass(self, runner: PassRunner) -> None:
        """Check all outputs of a pass; an implementation that is wrong in one loses its numbers."""
        first, again = runner.samples.check, runner.implementation.check(self._checker)
        if again.status != "ok":
            again.reason = f"right at first, wrong in pass {len(runner.passes)}: {again.reason}"
        if again.status != "ok" or (again.error_ratio or 0) >= (first.error_ratio or 0):
            runner.samples.check = again
        if again.status != "ok":
            self._hooks.failed(runner.implementation, again)
            self.measurements[runner.implementation.name].discard()

    # ---------------------------------------------------------------------------------------- after

    def examine(self, runners: Sequence[PassRunner]) -> None:
        """Hold the times against other evidence; an implementation that it contradicts loses its numbers."""
        for runner in runners:
            if runner.passes and self._correct(runner):
                one, beat = runner.implementation, self._hooks.heartbeat
                self._hooks.enter(one.name)
                self._tick("looking for doubts about", one, 0)
                where = "" if runner.headline else f"{runner.samples.variant}: "
                known = self.measurements[one.name].doubts
                with self._spared(one):
                    for doubt in evidence.doubts(runner, self._unseen, self._untimed, beat):
                        known.append(f"{where}{doubt}")
                if runner.headline and not known:
                    self._time_new_lengths(runner)
                beat()
        self._withhold()

    def _time_new_lengths(self, runner: PassRunner) -> None:
        one, fit = runner.implementation, self._times.new_lengths_fit(runner)
        measurement, cut = self.measurements[one.name], runner in self._times.cut
        fit = fit and not self._hooks.should_stop(self._times.new_lengths(runner), "new lengths")
        if measurement.due is None and fit:
            told = new_lengths.measure(one, self._scenario, self._checker, beat=self._hooks.heartbeat)
            measurement.new_lengths = told.times
            measurement.doubts += [told.doubt] if told.doubt else []
        elif isinstance(one, MlaLayer) and (measurement.due is None or cut):
            said = "forwards on new lengths are left out for lack of time"
            self._hooks.detail(f"{self._scenario.name}, {one.name}: {said}")

    def _withhold(self) -> None:
        """Take the numbers of what is in doubt."""
        for measurement in self.measurements.values():
            if measurement.doubts:
                measurement.discard()

    # ------------------------------------------------------------------------------------ interrupted

    def interrupt(self, implementations: Sequence[Implementation]) -> None:
        """Mark what an interrupt left undone, including implementations that had not started."""
        not_run = Check(status="not run", reason="interrupted")
        for one in implementations:
            nothing = Samples(HEADLINE, not_run)
            found = self.measurements.setdefault(one.name, Measurement(nothing))
            found.interrupted = True
            if found.check.status == "not run" and not found.check.reason:
                found.headline = nothing  # while it warmed up
        for runner in self._runners:
            if runner.passes and self._correct(runner):
                late = evidence.late_doubt(runner.passes)
                self.measurements[runner.implementation.name].doubts += [late] if late else []
                if runner.timer is not None and not runner.confirmed:
                    runner.samples.check = not_run
                    runner.samples.discard()
        self._withhold()
