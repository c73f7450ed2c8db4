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
from mla.bench.measure.passes import CacheFlush, PassRunner, warm_up
from mla.bench.measure.samples import Measurement, Samples, TransientBytes, read_sensors
from mla.bench.measure.target import MIN_PASSES, NO_TIME, Target, Timetable, shortened
from mla.bench.measure.variants import HEADLINE, Variant, VariantError, Variants, steps
from mla.bench.subjects.base import Implementation
from mla.bench.subjects.layer import CapturedForwards, MlaLayer, NoGraph
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
    timed = variants or Variants()
    engine = _Engine(implementations, scenario, inputs, checker, timed, backend, progress, hooks)
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
    for measurement in engine.measurements.values():
        if measurement.doubts:
            measurement.discard()
    return engine.measurements


@dataclass
class _Engine:
    """The measurement of one scenario."""

    implementations: Sequence[Implementation]
    scenario: Scenario
    inputs: Any
    checker: Any
    variants: Variants
    backend: Backend
    progress: ProgressCallback
    hooks: Hooks

    def __post_init__(self) -> None:
        self.measurements: dict[str, Measurement] = {}
        self.prefill, self.target = self.scenario.mode == "prefill", self.hooks.target
        self.first = self.hooks.first or self.implementations[0].name
        self.times = Timetable(self.target, self.prefill, self.variants.asked, self.first, self.correct)
        cold = any(variant.cache == "cold" for variant in self.variants.timed)
        self.flush = CacheFlush(self.backend) if cold else None
        self.runners: list[PassRunner] = []  # that are timed
        self.untimed = count(UNTIMED)  # numbers of passes that are not timed
        self.unseen: evidence.Unseen | None = None

    def tick(self, doing: str, implementation: Implementation, count: int = 1) -> None:
        """Say what is done, after so many forwards."""
        self.progress(f"{self.scenario.name}: {doing} {implementation.name}", count)

    def correct(self, runner: PassRunner) -> bool:
        """Whether all outputs of an implementation were right so far."""
        return self.measurements[runner.implementation.name].check.status == "ok"

    @contextmanager
    def running(self, implementation: Implementation) -> Iterator[None]:
        """Run an implementation inside the `with` block; if an op refuses it, it was not run."""
        self.hooks.enter(implementation.name)
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
        if reason := self.hooks.should_stop(0.0, "loading and checks"):
            measurement.headline.check.reason = reason
            return
        implementation.load(self.scenario, self.inputs)
        runner = self.runner(implementation, implementation, measurement.headline)
        self._warm_up(runner)
        self._shorten(runner)
        self.times.headlines.append(runner)
        forwards = min(self.scenario.inputs, len(runner.steps.run)) + len(runner.steps.run)
        if reason := self.hooks.should_stop(forwards * runner.forward_s, "checks and one timed pass"):
            measurement.headline.check = Check(status="not run", reason=reason)
            return
        start = self.target.now()
        measurement.transient_bytes = self._whole_pass(runner)
        if not runner.forward_s:  # without a warm-up
            runner.forward_s = (self.target.now() - start) / self.scenario.inputs
        measurement.headline.check = implementation.check(self.checker)
        if measurement.check.status == "ok":
            measurement.outputs = implementation.outputs()
        else:
            self.hooks.failed(implementation, measurement.check)

    def _whole_pass(self, runner: PassRunner) -> int:
        """Run a pass, and of a prefill one forward; return the transient bytes of the last, the longest."""
        implementation, transient = runner.implementation, TransientBytes()
        indices = runner.steps.run[: self.scenario.inputs]
        implementation.restore(CHECKED)
        for index in indices:
            implementation.before(index)
            implementation.meet()
            with transient if index == indices[-1] else nullcontext():
                implementation.step(index)
            implementation.after(index)
            self.tick("checking", implementation)
        implementation.outputs()
        return transient.peak + implementation.facts().scratch_bytes

    def _shorten(self, runner: PassRunner) -> None:
        """Let a yardstick run less that is much slower than the first implementation, or for lack of time.

        Its own fastest forward counts, and the median of others: a disturbance makes it no slower.
        """
        name, first_ms = runner.implementation.name, self.hooks.first_ms
        first, measurement = self.measurements.get(self.first), self.measurements[name]
        if first is not None and first.check.status == "ok":
            first_ms = first.warmup.typical_ms or 0.0
        if name == self.first or not first_ms or not measurement.warmup.ms:
            return
        waiting = len(self.implementations) - len(self.times.headlines)  # this one included
        most, added = self.times.forwards(runner, waiting), name in self.hooks.added
        less = shortened(self.scenario, self.variants.timed, first_ms, measurement.warmup.ms, most, added)
        if less is not None:
            runner.steps, whole = less, runner.steps
            measurement.due = less.passes
            counts = [f"{passes.passes} passes of {len(passes.run)}" for passes in (less, whole)]
            detail(f"{self.scenario.name}, {name}: too slow for all; running {' instead of '.join(counts)}")

    def make_runners(self) -> None:
        """Make the runners of all correct implementations; each variant is checked before it is timed."""
        self.target.leave_half()
        made: list[tuple[PassRunner, float]] = []  # and the seconds of a forward of its headline
        for headline in filter(self.correct, self.times.headlines):
            implementation, made_here = headline.implementation, [headline]
            measurement = self.measurements[implementation.name]
            if measurement.due is None:
                with self.running(implementation):
                    made_here += self._others(implementation, measurement)
            made += [(runner, headline.forward_s) for runner in made_here]
        for runner, forward_s in made:
            if not runner.headline and self.correct(runner):
                with self.running(runner.implementation):
                    self._check_variant(runner, forward_s)
        self.runners = [
            runner for runner, _ in made if self.correct(runner) and runner.samples.check.status == "ok"
        ]

    def _others(self, implementation: Implementation, measurement: Measurement) -> list[PassRunner]:
        """Return a runner per further variant of an implementation that has run a whole pass.

        All variants are noted in `measurement`, unavailable ones with the reason. Raises `VariantError` if
        graphs are required and this is the first implementation and has none.
        """
        timed = [variant for variant in self.variants.timed if variant != HEADLINE]
        further = [Samples(variant, Check(status="not run")) for variant in timed]
        measurement.others += further
        replayed: CapturedForwards | None = None
        if graphs := [samples for samples in further if samples.variant.mode == "graph"]:
            try:
                if not isinstance(implementation, MlaLayer):
                    raise NoGraph(f"{implementation.name} is not captured")
                replayed = CapturedForwards(implementation, self.scenario)
            except NoGraph as error:
                where = f"--mode graph: {self.scenario.name}, {implementation.name}"
                if implementation.name == self.first and self.variants.graphs_required:
                    raise VariantError(f"{where} cannot be replayed from graphs: {error}.") from error
                for samples in graphs:
                    samples.check.reason = str(error)
        runners = []
        for samples in further:
            forwards: Any = implementation if samples.variant.mode == "eager" else replayed
            if forwards is replayed and replayed is not None and samples.variant.clock == "device":
                forwards = replayed.without_bookkeeping()
            if forwards is not None:
                runners.append(self.runner(implementation, forwards, samples))
        return runners

    def runner(self, implementation: Implementation, forwards: Any, samples: Samples) -> PassRunner:
        """Return what runs and times the passes of one variant."""
        variant, backend = samples.variant, self.backend
        plan = steps(variant, self.scenario)
        timer = backend.device_timer() if variant.clock == "device" else None
        if timer is None and variant.clock == "device":
            raise VariantError(
                f"backend '{backend.name}' no longer has a device timer: device_timer() returned None."
            )
        flush = self.flush if variant.cache == "cold" else None
        parts = [getattr(forwards, "method", ""), flush.method if flush else "", plan.method()]
        samples.clock = timer.clock if timer else "host"
        samples.method = "; ".join(filter(None, parts))
        return PassRunner(implementation, forwards, backend.synchronize, timer, flush, plan, samples)

    def _check_variant(self, runner: PassRunner, forward_s: float) -> None:
        implementation, samples, start = runner.implementation, runner.samples, self.target.now()
        reason = "" if self.times.variant_fits(runner, forward_s) else NO_TIME
        if reason := reason or self.hooks.should_stop(2 * forward_s * len(runner.steps.run), "its check"):
            samples.check.reason = reason
            return
        runner.run(next(self.untimed), self.hooks.heartbeat)
        self.tick("checking", implementation, len(runner.steps.run))
        samples.check = implementation.check(self.checker)
        runner.seconds = [self.target.now() - start]
        if samples.check.status != "ok":
            self.hooks.failed(implementation, samples.check)
        elif not self.times.variant_fits(runner, 0.0):
            samples.check = Check(status="not run", reason=NO_TIME)
        else:
            self.times.variants.append(runner)
            if samples.variant == Variant(mode="graph"):  # else the check warms up enough
                self._warm_up(runner)

    def _warm_up(self, runner: PassRunner) -> None:
        implementation, ends = runner.implementation, list[float]()

        def tick(count: int) -> None:
            ends.append(self.target.now())
            self.tick("warming up", implementation, count)

        each, least = self.scenario.steps, self.scenario.warmups
        must = min(least, self.hooks.warmups)
        result = warm_up(runner.forwards, each, least, runner.time_step, self.untimed, tick, must)
        runner.ms = result.ms or 0.0
        if runner.headline:
            self.measurements[implementation.name].warmup = result
            if len(ends) > 1:
                runner.forward_s = median(after - before for before, after in pairwise(ends))

    # ------------------------------------------------------------------------------------------ timing

    def time(self, order: random.Random) -> None:
        """Time all passes, between two readings of the device's sensors."""
        if not self.runners or self.hooks.should_stop(0.0, "a timed pass"):
            return
        if hasattr(self.checker, "of"):  # of one op operands change from call to call
            most = max(evidence.forwards(runner.steps, self.prefill) for runner in self.runners)
            self.progress(f"{self.scenario.name}: drawing fresh inputs", 0)
            with self._spared():  # before time is shared out among the passes
                self.unseen = evidence.Unseen(self.inputs, self.checker, most)
            self.hooks.heartbeat()
        readings = read_sensors(self.backend, "before")
        for measurement in self.measurements.values():
            measurement.device_state = readings  # which an interrupt leaves as they are
        self._time_passes(order)
        self._say_cut()
        readings += read_sensors(self.backend, "after")

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
            self.unseen = None
            said = "memory is short: times are not cross-checked on fresh inputs"
            note(f"{self.scenario.name}: {said}")
            if implementation is not None:
                implementation.load(self.scenario, self.inputs)

    def _time_passes(self, order: random.Random) -> None:
        previous, rounds = None, self.scenario.rounds
        for index in range(rounds):
            due = [runner for runner in self.runners if runner.steps.due(index, rounds)]
            order.shuffle(due)
            for runner in due:
                if self.hooks.should_stop(self.times.ending(runner), "another pass"):
                    if index == 0:
                        continue  # a shorter pass of another implementation may still fit
                    return
                if self.correct(runner) and self.times.another(runner):
                    with self.running(runner.implementation):
                        self._time_pass(runner, switched=runner is not previous)
                    previous = runner

    def _say_cut(self) -> None:
        """Say what has fewer passes than were due; a headline is complete with those."""
        for runner in self.times.cut:
            name, done, due = runner.implementation.name, len(runner.passes), runner.steps.passes
            if not done:  # no headline: each has one
                runner.samples.check = Check(status="not run", reason=NO_TIME)
            elif self.correct(runner):
                what = ", ".join(filter(None, (name, runner.samples.variant.kind)))
                few = ", too few for an interval" if done < MIN_PASSES else ""
                said = f"{what}: {done} of {due} passes fit into a scenario's time{few}"
                detail(f"{self.scenario.name}, {said}; give --passes or --runs to time them all")
            if runner.headline and self.correct(runner):
                self.measurements[name].due = done

    def _time_pass(self, runner: PassRunner, switched: bool) -> None:
        """Time a pass and check all its outputs; an implementation that is wrong in one loses its numbers.

        Its number selects inputs that are the same for all implementations.
        """
        implementation, samples, start = runner.implementation, runner.samples, self.target.now()
        measurement = self.measurements[implementation.name]
        place = [other.variant for other in measurement.samples].index(samples.variant)
        number = 1 + place * self.scenario.rounds + len(runner.passes)
        runner.time(number, next(self.untimed), self.hooks.heartbeat)
        samples.after_switch.append(switched)
        of = f"pass {len(runner.passes)} of {runner.steps.passes} of"
        self.tick(f"timing {of}", implementation, len(runner.steps.run))
        first, again = samples.check, implementation.check(self.checker)
        if again.status != "ok":
            again.reason = f"right at first, wrong in pass {len(runner.passes)}: {again.reason}"
            self.hooks.failed(implementation, again)
            measurement.discard()
        if again.status != "ok" or (again.error_ratio or 0) >= (first.error_ratio or 0):
            samples.check = again
        runner.seconds.append(self.target.now() - start)

    # ---------------------------------------------------------------------------------------- after

    def examine(self) -> None:
        """Hold the times against other evidence; an implementation that it contradicts loses its numbers."""
        for runner in self.runners:
            if not runner.passes or not self.correct(runner):
                continue
            implementation, beat = runner.implementation, self.hooks.heartbeat
            self.hooks.enter(implementation.name)
            self.tick("cross-checking", implementation, 0)
            where = "" if runner.headline else f"{runner.samples.variant}: "
            known = self.measurements[implementation.name].doubts
            with self._spared(implementation):
                for doubt in evidence.doubts(runner, self.unseen, self.untimed, beat):
                    known.append(f"{where}{doubt}")
            if runner.headline and not known:
                self._time_new_lengths(runner)
            beat()

    def _time_new_lengths(self, runner: PassRunner) -> None:
        implementation, fit = runner.implementation, self.times.new_lengths_fit(runner)
        measurement, cut = self.measurements[implementation.name], runner in self.times.cut
        fit = fit and not self.hooks.should_stop(evidence.new_lengths_s(runner), "new lengths")
        if measurement.due is None and fit:
            what = (implementation, self.scenario, self.checker)
            measurement.new_lengths, doubt = evidence.on_new_lengths(*what, beat=self.hooks.heartbeat)
            measurement.doubts += [doubt] if doubt else []
        elif isinstance(implementation, MlaLayer) and (measurement.due is None or cut):
            said = "no time is left for unseen lengths"
            detail(f"{self.scenario.name}, {implementation.name}: {said}")

    def interrupt(self) -> None:
        """Mark what an interrupt left undone, including implementations that had not started."""
        for implementation in self.implementations:
            nothing = _not_run("interrupted")
            measurement = self.measurements.setdefault(implementation.name, Measurement(nothing))
            measurement.interrupted = True
            if measurement.check.status == "not run" and not measurement.check.reason:
                measurement.headline = nothing  # while it warmed up
        for runner in self.runners:
            if runner.passes and self.correct(runner):
                late = evidence.late_doubt(runner.passes)
                self.measurements[runner.implementation.name].doubts += [late] if late else []
                if runner.timer is not None and not runner.confirmed:
                    runner.samples.check = Check(status="not run", reason="interrupted")
                    runner.samples.discard()


def _not_run(reason: str = "") -> Samples:
    return Samples(HEADLINE, Check(status="not run", reason=reason))
