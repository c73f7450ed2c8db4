"""Passes: forwards from a restored history, timed one by one, and the time that passes beside them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

from mla.bench.doubts.clock import Disturbance, cpu_ns, now_ns
from mla.bench.doubts.device_wait import DeviceWait
from mla.bench.doubts.pass_times import PassTimes
from mla.bench.measure.samples import Samples
from mla.bench.measure.variants import HEADLINE, Steps
from mla.bench.subjects.base import Implementation
from mla.errors import MLAError
from mla_backends.api import Timer

# Milliseconds of a forward beside which what it finds in a cache does not count: even a large cache is read
# again in a hundredth of that.
LONG = 250.0


class ClockError(MLAError):
    """A timer whose readings are impossible."""

    exit_code = 3


class Forwards(Protocol):
    """The forwards of a pass: an implementation's own, or captured ones. Only `step` is timed."""

    def restore(self, number: int = 0) -> None: ...

    def before(self, index: int) -> None: ...

    def ready(self, index: int) -> None: ...

    def show(self, index: int) -> None: ...

    def step(self, index: int) -> None: ...

    def after(self, index: int) -> None: ...


class PassRunner:
    """Runs and times the passes of one implementation in one variant.

    The host clock is the runner's own, around forward and `synchronize`. It starts when the inputs are there
    and the device has finished all else; the backend has no turn in between, so it cannot work ahead. A
    `timer` is the device's clock, and is read inside that.
    """

    def __init__(
        self,
        implementation: Implementation,
        forwards: Forwards,
        synchronize: Callable[[], None],
        timer: Timer | None,
        flush: Callable[[], None] | None,
        steps: Steps,
        samples: Samples,
    ) -> None:
        self.implementation, self.steps, self.samples = implementation, steps, samples
        self.forwards, self.timer = forwards, timer
        self._synchronize, self._wait = synchronize, DeviceWait(implementation.setting.device)
        self._flush = flush
        self.passes: list[PassTimes] = []
        self.idles: list[PassTimes] = []
        self.ms = 0.0  # of the fastest forward of the warm-up after its first

    @property
    def headline(self) -> bool:
        """Whether this variant gives the case its number."""
        return self.samples.variant == HEADLINE

    @property
    def complete(self) -> bool:
        """Whether all passes were timed."""
        return len(self.samples.passes) == self.steps.passes

    def rewarm(self, number: int) -> None:
        """Reload into the caches what checks or another variant have evicted, unless they are flushed."""
        if self._flush is None and self.ms < LONG:
            self.forwards.restore(number)
            self.forwards.before(0)
            self.forwards.step(0)
            self.forwards.after(0)

    def time_step(self, index: int) -> float:
        """Run a step and return its milliseconds on the runner's clock."""
        self._wait()
        start = now_ns()
        self.forwards.step(index)
        self._synchronize()
        return (now_ns() - start) / 1e6

    def run(self, number: int, heartbeat: Callable[[], None]) -> PassTimes:
        """Run a pass; `heartbeat` is called after every forward."""
        return self._pass(number, self.forwards.step, heartbeat)

    def idle(self, number: int, heartbeat: Callable[[], None]) -> PassTimes:
        """Do all that a pass does beside its forwards, without them."""
        with self.implementation.idle():
            return self._pass(number, lambda index: None, heartbeat)

    def time(self, number: int, untimed: Iterator[int], heartbeat: Callable[[], None]) -> None:
        """Run a pass and record its samples. Raises `ClockError` for impossible readings."""
        times = self.pair(number, untimed, heartbeat).samples
        impossible = [one for one in times if not 0 <= one < math.inf]
        if impossible or not statistics.median(times):
            clock, reading = self.samples.clock, [*impossible, 0.0][0]
            raise ClockError(f"the {clock} clock of this backend measured {reading} ms for a forward.")
        self.samples.passes.append(times)
        self.implementation.recorded()

    def pair(self, number: int, untimed: Iterator[int], heartbeat: Callable[[], None]) -> PassTimes:
        """Run a pass after all that it does beside its forwards, without them.

        The idle pass has inputs of its own: nothing can be learned there for the timed one. In between, a
        forward reloads into the caches what has been evicted.
        """
        self.idles.append(self.idle(next(untimed), heartbeat))
        self.rewarm(next(untimed))
        self.passes.append(self.run(number, heartbeat))
        return self.passes[-1]

    def _pass(self, number: int, step: Callable[[int], None], heartbeat: Callable[[], None]) -> PassTimes:
        forwards, found = self.forwards, PassTimes(forwards=len(self.steps.run))
        forwards.restore(number)
        self._synchronize()
        disturbance = Disturbance()
        began, began_cpu = now_ns(), cpu_ns()
        for index in self.steps.run:
            timed = index in self.steps.timed
            forwards.ready(index)
            if timed and self._flush is not None:
                self._apart(self._flush, found)
            if self.implementation.rehearses:
                self._apart(partial(self.implementation.rehearse, index), found)
            forwards.show(index)
            self._wait()
            self._region(step, index, timed, found)
            forwards.after(index)
            heartbeat()
        self.implementation.collect()
        found.wall_cpu += (cpu_ns() - began_cpu) / 1e6
        found.wall += (now_ns() - began) / 1e6
        found.disturbed = disturbance.spoils(found.wall)
        found.samples = self.implementation.slowest(found.samples)
        return found

    def _apart(self, work: Callable[[], None], found: PassTimes) -> None:
        """Do what is no part of the pass, such as flushing the cache, and wait for it.

        Without the backend, which has no turn before the clock starts.
        """
        self._wait()
        start, start_cpu = now_ns(), cpu_ns()
        work()
        found.wall -= (now_ns() - start) / 1e6
        found.wall_cpu -= (cpu_ns() - start_cpu) / 1e6

    def _region(self, step: Callable[[int], None], index: int, timed: bool, found: PassTimes) -> None:
        timer = self.timer if timed else None
        sample = None
        start_cpu = cpu_ns()
        if timer is None:
            start = now_ns()
            step(index)
            self._synchronize()
        else:
            start = now_ns()
            timer.start()
            step(index)
            sample = timer.stop()
        inside = (now_ns() - start) / 1e6
        found.regions += inside
        found.regions_cpu += (cpu_ns() - start_cpu) / 1e6
        if timed:
            found.inside.append(inside)
            found.samples.append(inside if sample is None else sample)
