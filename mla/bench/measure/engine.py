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
from dataclasses import dataclass
from itertools import count, pairwise
from statistics import median
from typing import Any

from mla.bench.limits.microbench import no_garbage_collection
from mla.bench.measure import evidence
from mla.bench.measure.passes import PassRunner, Setup, warm_up
from mla.bench.measure.samples import Measurement, Samples, TransientBytes, read_sensors
from mla.bench.measure.target import MIN_PASSES, NO_TIME, Target, Timetable, shortened
from mla.bench.measure.variants import HEADLINE, Variant, Variants
from mla.bench.subjects.base import Implementation
from mla.bench.subjects.layer import MlaLayer
from mla.bench.workload.implementations import parse_one
from mla.bench.workload.scenario import Scenario
from mla.command import exit_codes
from mla.command.console import detail, note
from mla.errors import OutOfMemory, UnsupportedBatch
from mla.verify.verdict import Check
from mla_backends import BackendError
from mla_backends.api import Backend

# Numbers of the pass that is checked first, and of passes that are not timed: no timed pass has them.
CHECKED, UNTIMED = 1 << 20, 1 << 21

ProgressCallback = Callable[[str, int], None]  # what is running, forwards done since the last call


@dataclass(frozen=True)
class Hooks:
    """Callbacks, none of them inside a timed region. By default the engine runs to the end."""

    # Asked before all that may take long, with its seconds and name: why it does not fit, or "".
    should_stop: Callable[[float, str], str] = lambda seconds, what: ""
    enter: Callable[[str], None] = lambda name: None  # the implementation that runs from now on
    heartbeat: Callable[[], None] = lambda: None  # called between forwards
    # An implementation whose pass was wrong, while its inputs, cache and collected outputs are in place.
    failed: Callable[[Implementation, Check], None] = lambda implementation, check: None
    warmups: int = 0  # that the user asked for: they run however long they take
    first: str = ""  # the run's first implementation; by default the first that is measured
    first_ms: float = 0.0  # of a forward of it, if it has run before
    added: Sequence[str] = ()  # implementations that nobody asked for
    target: Target = Target()  # noqa: RUF009  # without limits, nothing of it changes


def refusal(error: Exception, implementation: str) -> str:
    """Return why an op of `implementation` refuses its batch, and the cure; "" for any other error.

    A `BackendError` that an op raises is a refusal, as the contract says.
    """
    if isinstance(error, UnsupportedBatch):
        return str(error)
    if isinstance(error, BackendError) and (op := exit_codes.op_name(error)) is not None:
        cure = "Use the reference ops for it (`--ops reference`)."
        if parse_one(implementation).ops:
            cure = f"Leave `{implementation}` out of --implementations."
        return f"{op}{': ' if op else ''}{str(error).rstrip('.')}. {cure}"
    return ""


def too_large(error: Exception) -> bool:
    """Return whether memory was short, of the host or of a device."""
    return isinstance(error, (OutOfMemory, MemoryError)) or type(error).__name__ == "OutOfMemoryError"


def measure(
    implementations: Sequence[Implementation],
    scenario: Scenario,
    inputs: Any,
    checker: Any,
    backend: Backend,
    seed: int,
    variants: Variants | None = None,
    progress: ProgressCallback = lambda what, done: None,
    hooks: Hooks = Hooks(),  # immutable
) -> dict[str, Measurement]:
    """Return implementation name -> measurement.

    `inputs` and `checker` are what the implementations are loaded and checked with. An interrupt or
    `hooks.should_stop` ends it early; complete passes are kept. What an op refuses costs its own
    implementation its numbers, and no other. Raises `VariantError` if graphs are
    required and the first implementation has none.
    """
    setup = Setup(backend, variants or Variants(), scenario)
    engine = _Engine(implementations, scenario, inputs, checker, setup, backend, progress, hooks)
    gc.collect()
    with no_garbage_collection():  # the same for checks and timing: no op can tell them apart by it
        try:
            for implementation in implementations:
                with engine.running(implementation):
                    engine.load_and_check(implementation)
            engine.make_runners()
            engine.time(random.Random(seed))
            engine.examine()
        except KeyboardInterrupt:
            engine.interrupt()
    return engine.measurements


class _Engine:
    """The measurement of one scenario."""

    def __init__(
        self,
        implementations: Sequence[Implementation],
        scenario: Scenario,
        inputs: Any,
        checker: Any,
        setup: Setup,
        backend: Backend,
        progress: ProgressCallback,
        hooks: Hooks,
    ) -> None:
        self.measurements: dict[str, Measurement] = {}
        self._implementations, self._scenario, self._setup = implementations, scenario, setup
        self._inputs, self._checker, self._backend = inputs, checker, backend
        self._progress, self._hooks = progress, hooks
        self._prefill, self._first = scenario.mode == "prefill", hooks.first or implementations[0].name
        self._times = Timetable(hooks.target, self._prefill, setup.asked, self._first, self._correct)
        self._runners: list[PassRunner] = []  # that are timed
        self._untimed = count(UNTIMED)  # numbers of passes that are not timed
        self._unseen: evidence.Unseen | None = None

    def _tick(self, doing: str, implementation: Implementation, count: int = 1) -> None:
        self._progress(f"{self._scenario.name}: {doing} {implementation.name}", count)

    def _correct(self, runner: PassRunner) -> bool:
        return self.measurements[runner.implementation.name].check.status == "ok"

    @contextmanager
    def running(self, implementation: Implementation) -> Iterator[None]:
        """Run an implementation inside the `with` block; if an op refuses it, it was not run."""
        self._hooks.enter(implementation.name)
        try:
            yield
        except Exception as error:  # all others are raised again
            reason = refusal(error, implementation.name)
            if not reason:
                raise
            self.measurements[implementation.name] = Measurement(_not_run(reason), refused=True)

    # ------------------------------------------------------------------------------------------ before

    def load_and_check(self, implementation: Implementation) -> None:
        """Warm up and run a whole pass, untimed; the transient memory of the last forward is counted."""
        measurement = self.measurements[implementation.name] = Measurement(_not_run())
        if reason := self._hooks.should_stop(0.0, "loading and checks"):
            measurement.headline.check.reason = reason
            return
        implementation.load(self._scenario, self._inputs)
        runner = self._setup.headline(implementation, measurement)
        self._warm_up(runner)
        self._shorten(runner)
        self._times.headlines.append(runner)
        forwards = min(self._scenario.inputs, len(runner.steps.run)) + len(runner.steps.run)
        if reason := self._hooks.should_stop(forwards * runner.forward_s, "checks and one timed pass"):
            measurement.headline.check = Check(status="not run", reason=reason)
            return
        start = self._hooks.target.now()
        measurement.transient_bytes = self._whole_pass(runner)
        if not runner.forward_s:  # without a warm-up
            runner.forward_s = (self._hooks.target.now() - start) / self._scenario.inputs
        measurement.headline.check = implementation.check(self._checker)
        if measurement.check.status == "ok":
            measurement.outputs = implementation.outputs()
        else:
            self._hooks.failed(implementation, measurement.check)

    def _whole_pass(self, runner: PassRunner) -> int:
        """Run a pass, and of a prefill one forward; return the transient bytes of the last, the longest."""
        implementation, transient = runner.implementation, TransientBytes()
        indices = runner.steps.run[: self._scenario.inputs]
        implementation.restore(CHECKED)
        for index in indices:
            implementation.before(index)
            implementation.meet()
            with transient if index == indices[-1] else nullcontext():
                implementation.step(index)
            implementation.after(index)
            self._tick("checking", implementation)
        implementation.outputs()
        return transient.peak + implementation.facts().scratch_bytes

    def _shorten(self, runner: PassRunner) -> None:
        """Let a yardstick run less that is much slower than the first implementation, or for lack of time.

        Its own fastest forward counts, and the median of others: a disturbance makes it no slower.
        """
        name, first_ms = runner.implementation.name, self._hooks.first_ms
        first, ms = self.measurements.get(self._first), self.measurements[name].warm_ms
        if first is not None and first.check.status == "ok":
            first_ms = first.typical_ms or 0.0
        if name == self._first or not first_ms or not ms:
            return
        waiting = len(self._implementations) - len(self._times.headlines)  # this one included
        most, added = self._times.forwards(runner, waiting), name in self._hooks.added
        less = shortened(self._scenario, self._setup.timed, first_ms, ms, most, added)
        if less is not None:
            runner.steps, whole = less, runner.steps
            self.measurements[name].due = runner.steps.passes
            counts = [f"{passes.passes} passes of {len(passes.run)}" for passes in (runner.steps, whole)]
            detail(f"{self._scenario.name}, {name}: too slow for all; running {' instead of '.join(counts)}")

    def make_runners(self) -> None:
        """Make the runners of all correct implementations; each variant is checked before it is timed."""
        self._hooks.target.leave_half()
        made: list[PassRunner] = []
        for runner in self._times.headlines:
            implementation = runner.implementation
            measurement = self.measurements[implementation.name]
            if measurement.check.status == "ok":
                made.append(runner)
                if measurement.due is None:
                    with self.running(implementation):
                        first = implementation.name == self._first
                        made += self._setup.others(implementation, measurement, first)
        for runner in made:
            if not runner.headline and self._correct(runner):
                with self.running(runner.implementation):
                    self._check_variant(runner)
        self._runners = [
            runner for runner in made if self._correct(runner) and runner.samples.check.status == "ok"
        ]

    def _check_variant(self, runner: PassRunner) -> None:
        implementation, start = runner.implementation, self._hooks.target.now()
        left_out = Check(status="not run", reason=NO_TIME)
        (forward,) = (
            other.forward_s for other in self._times.headlines if other.implementation is implementation
        )
        if not self._times.variant_fits(runner, forward):
            runner.samples.check = left_out
            return
        if reason := self._hooks.should_stop(2 * forward * len(runner.steps.run), "its check"):
            runner.samples.check = Check(status="not run", reason=reason)
            return
        runner.run(next(self._untimed), self._hooks.heartbeat)
        self._tick("checking", implementation, len(runner.steps.run))
        runner.samples.check = implementation.check(self._checker)
        runner.seconds = [self._hooks.target.now() - start]
        if runner.samples.check.status != "ok":
            self._hooks.failed(implementation, runner.samples.check)
        elif not self._times.variant_fits(runner, 0.0):
            runner.samples.check = left_out
        else:
            self._times.variants.append(runner)
            if runner.samples.variant == Variant(mode="graph"):  # else the check warms up enough
                self._warm_up(runner)

    def _warm_up(self, runner: PassRunner) -> None:
        implementation, ends = runner.implementation, list[float]()

        def tick(count: int) -> None:
            ends.append(self._hooks.target.now())
            self._tick("warming up", implementation, count)

        steps, least = self._scenario.steps, self._scenario.warmups
        must = min(least, self._hooks.warmups)
        result = warm_up(runner.forwards, steps, least, runner.time_step, self._untimed, tick, must)
        runner.ms = result.ms or 0.0
        if runner.headline:
            measurement = self.measurements[implementation.name]
            measurement.warmups, measurement.settled = result.forwards, result.settled
            measurement.warm_ms, measurement.typical_ms = result.ms, result.typical_ms
            if len(ends) > 1:
                runner.forward_s = median(after - before for before, after in pairwise(ends))

    # ------------------------------------------------------------------------------------------ timing

    def time(self, order: random.Random) -> None:
        """Time all passes, between two readings of the device's sensors."""
        if not self._runners or self._hooks.should_stop(0.0, "a timed pass"):
            return
        if hasattr(self._checker, "of"):  # of one op operands change from call to call
            self._draw_unseen()
        self._sense("before")
        self._time_passes(order)
        self._say_cut()
        self._sense("after")

    def _draw_unseen(self) -> None:
        """Make the inputs of the evidence and their oracle, before time is shared out among the passes."""
        count = max(evidence.forwards(runner.steps, self._prefill) for runner in self._runners)
        self._progress(f"{self._scenario.name}: drawing fresh inputs", 0)
        with self._spared():
            self._unseen = evidence.Unseen(self._inputs, self._checker, count)
        self._hooks.heartbeat()

    @contextmanager
    def _spared(self, implementation: Implementation | None = None) -> Iterator[None]:
        """Let lack of memory cost evidence, and no finished number; the passes' inputs are loaded again.

        Layers over ranks are gone by then, on all of them.
        """
        try:
            yield
        except Exception as error:  # all others are raised again
            over_ranks = implementation is not None and implementation.setting.ranks is not None
            if not too_large(error) or over_ranks:
                raise
            self._unseen = None
            said = "memory is short: times are not cross-checked on fresh inputs"
            note(f"{self._scenario.name}: {said}")
            if implementation is not None:
                implementation.load(self._scenario, self._inputs)

    def _sense(self, when: str) -> None:
        state = read_sensors(self._backend, when)
        for measurement in self.measurements.values():
            measurement.device_state += [dict(reading) for reading in state]

    def _time_passes(self, order: random.Random) -> None:
        previous, rounds = None, self._scenario.rounds
        for index in range(rounds):
            due = [runner for runner in self._runners if runner.steps.due(index, rounds)]
            order.shuffle(due)
            for runner in due:
                if self._hooks.should_stop(self._times.ending(runner), "another pass"):
                    if index == 0:
                        continue  # a shorter pass of another implementation may still fit
                    return
                if self._correct(runner) and self._times.another(runner):
                    with self.running(runner.implementation):
                        self._time_pass(runner, switched=runner is not previous)
                    previous = runner

    def _say_cut(self) -> None:
        """Say what has fewer passes than were due; a headline is complete with those."""
        for runner in self._times.cut:
            name, done, due = runner.implementation.name, len(runner.passes), runner.steps.passes
            if not done:  # no headline: each has one
                runner.samples.check = Check(status="not run", reason=NO_TIME)
            elif self._correct(runner):
                what = ", ".join(part for part in (name, runner.samples.variant.kind) if part)
                few = ", too few for an interval" if done < MIN_PASSES else ""
                said = f"{what}: {done} of {due} passes fit into a scenario's time{few}"
                detail(f"{self._scenario.name}, {said}; give --passes or --runs to time them all")
            if runner.headline and self._correct(runner):
                self.measurements[name].due = done

    def _time_pass(self, runner: PassRunner, switched: bool) -> None:
        start = self._hooks.target.now()
        runner.time(self._number(runner), next(self._untimed), self._hooks.heartbeat)
        runner.samples.after_switch.append(switched)
        of = f"pass {len(runner.passes)} of {runner.steps.passes} of"
        self._tick(f"timing {of}", runner.implementation, len(runner.steps.run))
        self._check_pass(runner)
        runner.seconds.append(self._hooks.target.now() - start)

    def _number(self, runner: PassRunner) -> int:
        """Return the number of a variant's next pass: inputs are the same for all implementations."""
        samples = self.measurements[runner.implementation.name].samples
        place = [variant.variant for variant in samples].index(runner.samples.variant)
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

    def examine(self) -> None:
        """Hold the times against other evidence; an implementation that it contradicts loses its numbers."""
        for runner in self._runners:
            if not runner.passes or not self._correct(runner):
                continue
            implementation, beat = runner.implementation, self._hooks.heartbeat
            self._hooks.enter(implementation.name)
            self._tick("cross-checking", implementation, 0)
            where = "" if runner.headline else f"{runner.samples.variant}: "
            known = self.measurements[implementation.name].doubts
            with self._spared(implementation):
                for doubt in evidence.doubts(runner, self._unseen, self._untimed, beat):
                    known.append(f"{where}{doubt}")
            if runner.headline and not known:
                self._time_new_lengths(runner)
            beat()
        self._withhold()

    def _time_new_lengths(self, runner: PassRunner) -> None:
        implementation, fit = runner.implementation, self._times.new_lengths_fit(runner)
        measurement, cut = self.measurements[implementation.name], runner in self._times.cut
        fit = fit and not self._hooks.should_stop(evidence.new_lengths_s(runner), "new lengths")
        if measurement.due is None and fit:
            what = (implementation, self._scenario, self._checker)
            measurement.new_lengths, doubt = evidence.on_new_lengths(*what, beat=self._hooks.heartbeat)
            measurement.doubts += [doubt] if doubt else []
        elif isinstance(implementation, MlaLayer) and (measurement.due is None or cut):
            said = "no time is left for unseen lengths"
            detail(f"{self._scenario.name}, {implementation.name}: {said}")

    def _withhold(self) -> None:
        """Take the numbers of what is in doubt."""
        for measurement in self.measurements.values():
            if measurement.doubts:
                measurement.discard()

    # ------------------------------------------------------------------------------------ interrupted

    def interrupt(self) -> None:
        """Mark what an interrupt left undone, including implementations that had not started."""
        for implementation in self._implementations:
            nothing = _not_run("interrupted")
            measurement = self.measurements.setdefault(implementation.name, Measurement(nothing))
            measurement.interrupted = True
            if measurement.check.status == "not run" and not measurement.check.reason:
                measurement.headline = nothing  # while it warmed up
        for runner in self._runners:
            if runner.passes and self._correct(runner):
                late = evidence.late_doubt(runner.passes)
                self.measurements[runner.implementation.name].doubts += [late] if late else []
                if runner.timer is not None and not runner.confirmed:
                    runner.samples.check = Check(status="not run", reason="interrupted")
                    runner.samples.discard()
        self._withhold()


def _not_run(reason: str = "") -> Samples:
    return Samples(HEADLINE, Check(status="not run", reason=reason))
