"""Passes: forwards from a restored history, timed one by one; and the warm-up before them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter_ns as now_ns
from typing import Any

import torch

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


@dataclass
class PassTimes:
    """Milliseconds of the timed forwards of one pass."""

    samples: list[float] = field(default_factory=list)  # on the variant's clock
    inside: list[float] = field(default_factory=list)  # on the runner's clock, around the same regions
    late: list[float] = field(default_factory=list)  # that a copy to the host waited for afterwards


class PassRunner:
    """Runs and times the passes of one implementation in one variant.

    The host clock is the runner's own, around forward and `synchronize`. It starts when the inputs are there
    and the device has finished all else; the backend has no turn in between, so it cannot work ahead. A
    `timer` is the device's clock, and is read inside that. `forwards` are the implementation, or its captured
    ones.
    """

    def __init__(
        self,
        implementation: Implementation,
        forwards: Any,
        synchronize: Callable[[], None],
        timer: Timer | None,
        flush: Callable[[], None] | None,
        steps: Steps,
        samples: Samples,
    ) -> None:
        self.implementation, self.steps, self.samples = implementation, steps, samples
        self.forwards, self.timer = forwards, timer
        self._synchronize, self._flush = synchronize, flush
        self._there = torch.zeros(1, device=implementation.setting.device)
        self._here = torch.zeros(1)
        self.passes: list[PassTimes] = []
        self.ms = 0.0  # of the fastest forward of the warm-up after its first
        self.confirmed = False  # whether the host's clock agrees with that of the timer

    @property
    def headline(self) -> bool:
        """Whether this variant gives the case its number."""
        return self.samples.variant == HEADLINE

    def wait(self) -> None:
        """Wait for the device by copying a number to the host: no call of the backend."""
        self._here.copy_(self._there)

    def time_step(self, index: int) -> float:
        """Run a step, once all ranks are ready for it, and return its milliseconds on the runner's clock."""
        self.implementation.meet()
        self.wait()
        start = now_ns()
        self.forwards.step(index)
        self._synchronize()
        return (now_ns() - start) / 1e6

    def rewarm(self, number: int) -> None:
        """Reload into the caches what checks or another variant have evicted, unless they are flushed."""
        if self._flush is None and self.ms < LONG:
            self.forwards.restore(number)
            self.forwards.before(0)
            self.implementation.meet()
            self.forwards.step(0)
            self.forwards.after(0)

    def time(self, number: int, rewarming: int, beat: Callable[[], None]) -> None:
        """Run a pass, after a forward of pass `rewarming`, and record its samples.

        Raises `ClockError` for impossible readings.
        """
        self.rewarm(rewarming)
        taken = self.run(number, beat)
        impossible = [ms for ms in taken.samples if not 0 <= ms < math.inf]
        if impossible or not median(taken.samples):
            clock, reading = self.samples.clock, [*impossible, 0.0][0]
            raise ClockError(f"the {clock} clock of this backend measured {reading} ms for a forward.")
        self.passes.append(taken)
        self.samples.passes.append(taken.samples)

    def run(self, number: int, beat: Callable[[], None], count: int | None = None) -> PassTimes:
        """Run a pass, or its first `count` forwards; `beat` is called after every forward."""
        forwards, one, taken = self.forwards, self.implementation, PassTimes()
        forwards.restore(number)
        self._synchronize()
        for index in self.steps.run[:count]:
            timed = index in self.steps.timed
            forwards.before(index)
            if timed and self._flush is not None:
                self._flush()
            one.meet()
            self.wait()
            self._region(index, taken if timed else PassTimes(), self.timer if timed else None)
            forwards.after(index)
            beat()
        one.outputs()  # are copied to the host before anything else calls the backend
        taken.samples = one.slowest(taken.samples)
        return taken

    def _region(self, index: int, taken: PassTimes, timer: Timer | None) -> None:
        sample = None
        start = now_ns()
        if timer is None:
            self.forwards.step(index)
            self._synchronize()
        else:
            timer.start()
            self.forwards.step(index)
            sample = timer.stop()
        end = now_ns()
        self.wait()
        waited = now_ns()
        self.wait()
        inside = (end - start) / 1e6
        taken.inside.append(inside)
        taken.late.append((waited - end - (now_ns() - waited)) / 1e6)
        taken.samples.append(inside if sample is None else sample)


# ------------------------------------------------------------------------------------------------ warm-up

# Latencies have settled once the median of the last WINDOW is within WITHIN of that of the WINDOW before.
WINDOW, WITHIN = 5, 0.05
# The most forwards beyond those that a workload names, and the seconds, without the first forward, after
# which no more are run: that one may compile or load what all others use.
MOST, SECONDS = 100, 2.0
# Forwards that run however long they take.
FEWEST = 2


@dataclass(frozen=True)
class WarmupResult:
    """How a warm-up went. `settled` is None when none was asked for, or too few were run to tell."""

    forwards: int = 0
    settled: bool | None = None
    ms: float | None = field(default=None, compare=False)  # of the fastest forward after the first one
    typical_ms: float | None = field(default=None, compare=False)  # their median


def warm_up(
    forwards: Any,
    steps: int,
    least: int,
    time_step: Callable[[int], float],
    numbers: Iterator[int],
    tick: Callable[[int], None],
    must: int = 0,
) -> WarmupResult:
    """Run forwards until latencies settle; the history is restored every `steps` forwards, as in a pass.

    At least `least` forwards run, unless they take `SECONDS`; `must` of them run whatever they take; 0: none.
    `time_step` runs a step and returns its milliseconds. Every pass takes the next of `numbers`. `tick` is
    called after every forward, with 1 for the first `least` forwards and 0 afterwards.
    """
    if not least:
        return WarmupResult()
    taken: list[float] = []
    while not _done(taken, least, max(must, FEWEST)):
        index = len(taken) % steps
        if index == 0:
            forwards.restore(next(numbers))
        forwards.before(index)
        taken.append(time_step(index))
        forwards.after(index)
        tick(int(len(taken) <= least))
    too_few = len(taken) <= FEWEST and taken[-1] <= taken[0]  # the first one may have made what all use
    known = None if too_few and not settled(taken) else settled(taken)
    return WarmupResult(len(taken), known, min(taken[1:]), median(taken[1:]))


def _done(taken: Sequence[float], least: int, must: int) -> bool:
    count = len(taken)
    if count < must:
        return False
    if sum(taken[1:]) >= 1e3 * SECONDS:
        return True
    return count >= least and (count >= least + MOST or (count >= 2 * WINDOW and settled(taken)))


def settled(taken: Sequence[float]) -> bool:
    """Return whether the last window of milliseconds is as fast as the one before, within `WITHIN`."""
    window = max(1, min(WINDOW, len(taken) // 2))
    if len(taken) < 2:
        return False
    before, now = median(taken[-2 * window : -window]), median(taken[-window:])
    return abs(now - before) <= WITHIN * before
