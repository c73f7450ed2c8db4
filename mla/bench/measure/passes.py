"""Passes: forwards from a restored history, timed one by one; the warm-up before them; and what they need.

A cache flush reads and writes a buffer of twice the last-level cache on the device, and is finished before
timing starts. That evicts weights, latents, hidden states and tables from every data cache on the way to
memory. It does not empty instruction caches, branch predictors or TLBs, and leaves an accelerator's host
alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter_ns as now_ns
from typing import Any

import torch

from mla.bench.measure.samples import Samples, WarmupResult
from mla.bench.measure.variants import HEADLINE, Steps
from mla.bench.subjects.base import Implementation
from mla.errors import MLAError
from mla.text import size
from mla_backends import host
from mla_backends.api import Backend, Timer

# Milliseconds of a forward beside which what it finds in a cache does not count: even a large cache is read
# again in a hundredth of that.
LONG_MS = 250.0


class ClockError(MLAError):
    """A timer whose readings are impossible."""

    exit_code = 3


@dataclass
class PassTimes:
    """Milliseconds of the timed forwards of one pass."""

    samples: list[float] = field(default_factory=list)  # on the variant's clock
    inside: list[float] = field(default_factory=list)  # on the runner's clock, around the same regions
    late: list[float] = field(default_factory=list)  # that a copy to the host waited for afterwards


@dataclass(eq=False)
class PassRunner:
    """Runs and times the passes of one implementation in one variant.

    The host clock is the runner's own, around forward and `synchronize`. It starts when the inputs are there
    and the device has finished all else; the backend has no turn in between, so it cannot work ahead. A
    `timer` is the device's clock, and is read inside that. `forwards` are the implementation, or its captured
    ones.
    """

    implementation: Implementation
    forwards: Any
    synchronize: Callable[[], None]
    timer: Timer | None
    flush: Callable[[], None] | None
    steps: Steps
    samples: Samples
    passes: list[PassTimes] = field(default_factory=list)
    ms: float = 0.0  # of the fastest forward of the warm-up after its first
    forward_s: float = 0.0  # seconds of a forward of the headline, with all that goes with it, once known
    seconds: list[float] = field(default_factory=list)  # of passes, with all that goes with them
    confirmed: bool = False  # whether the host's clock agrees with that of the timer

    def __post_init__(self) -> None:
        self._there, self._here = torch.zeros(1, device=self.implementation.setting.device), torch.zeros(1)

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
        self.synchronize()
        return (now_ns() - start) / 1e6

    def rewarm(self, number: int) -> None:
        """Reload into the caches what checks or another variant have evicted, unless they are flushed."""
        if self.flush is None and self.ms < LONG_MS:
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
        forwards, implementation, taken = self.forwards, self.implementation, PassTimes()
        forwards.restore(number)
        self.synchronize()
        for index in self.steps.run[:count]:
            timed = index in self.steps.timed
            forwards.before(index)
            if timed and self.flush is not None:
                self.flush()
            implementation.meet()
            self.wait()
            self._region(index, taken if timed else PassTimes(), self.timer if timed else None)
            forwards.after(index)
            beat()
        implementation.outputs()  # are copied to the host before anything else calls the backend
        taken.samples = implementation.slowest(taken.samples)
        return taken

    def _region(self, index: int, taken: PassTimes, timer: Timer | None) -> None:
        """Time a forward, and how long copies to the host wait for the device afterwards."""
        sample = None
        start = now_ns()
        if timer is None:
            self.forwards.step(index)
            self.synchronize()
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

# Latencies have settled once the median of the last WINDOW is within SETTLED of that of the WINDOW before.
WINDOW, SETTLED = 5, 0.05
# The most forwards beyond those that a workload names, and the seconds, without the first forward, after
# which no more are run: that one may compile or load what all others use.
MAX_EXTRA, WARMUP_S = 100, 2.0
# Forwards that run however long they take.
MIN_WARMUPS = 2


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

    At least `least` forwards run (0: none), unless they take `WARMUP_S`; `must` of them run in any case.
    `time_step` runs a step and returns its milliseconds. Every pass takes the next of `numbers`. `tick` is
    called after every forward, with 1 for the first `least` forwards and 0 afterwards.
    """
    if not least:
        return WarmupResult()
    taken: list[float] = []
    while not _done(taken, least, max(must, MIN_WARMUPS)):
        index = len(taken) % steps
        if index == 0:
            forwards.restore(next(numbers))
        forwards.before(index)
        taken.append(time_step(index))
        forwards.after(index)
        tick(int(len(taken) <= least))
    too_few = len(taken) <= MIN_WARMUPS and taken[-1] <= taken[0]  # the first may have made what all use
    is_settled = settled(taken) or (None if too_few else False)
    return WarmupResult(len(taken), is_settled, min(taken[1:]), median(taken[1:]))


def _done(taken: Sequence[float], least: int, must: int) -> bool:
    count = len(taken)
    if count < must:
        return False
    if sum(taken[1:]) >= 1e3 * WARMUP_S:
        return True
    return count >= least and (count >= least + MAX_EXTRA or (count >= 2 * WINDOW and settled(taken)))


def settled(taken: Sequence[float]) -> bool:
    """Return whether the last window of milliseconds is as fast as the one before, within `SETTLED`."""
    window = max(1, min(WINDOW, len(taken) // 2))
    if len(taken) < 2:
        return False
    before, now = median(taken[-2 * window : -window]), median(taken[-window:])
    return abs(now - before) <= SETTLED * before


# ------------------------------------------------------------------------------ flushes, clocks and graphs

# Size of the buffer relative to the cache: replacement is not strictly oldest first.
CACHE_SIZES = 2
# Size of the buffer in bytes if the size of the cache is unknown, or declared below what any device has.
FALLBACK_BYTES, MIN_CACHE_BYTES = 256 << 20, 1 << 20
# Bounds of the buffer in bytes: flushing a whole machine's shared cache would take longer than the forwards.
MIN_FLUSH_BYTES, MAX_FLUSH_BYTES = 64 << 20, 512 << 20


def sweep(backend: Backend) -> tuple[int, str]:
    """Return the bytes of a buffer that flushes the last-level cache of a backend's device, and why so many.

    Its declared size is held against what is known from elsewhere: the host's own caches, where it is the
    device, and what no device falls short of.
    """
    declared, is_host = backend.device_info().cache_bytes, getattr(backend.device, "type", "") == "cpu"
    cache = max(declared or 0, (host.last_level_cache() or 0) if is_host else 0)
    if cache < MIN_CACHE_BYTES:
        unknown = f"that cannot be as small as the {cache} bytes declared" if cache else "of unknown size"
        return FALLBACK_BYTES, f"for a last-level cache {unknown}"
    reason = f"for a last-level cache of {size(cache, '-', 'MiB', 'g')}"
    if declared is not None and declared < cache:
        reason += " (as the host reports; the backend declares less)"
    if CACHE_SIZES * cache > MAX_FLUSH_BYTES:
        reason += ": less than twice its size, so that some of it may stay warm"
    return min(max(CACHE_SIZES * cache, MIN_FLUSH_BYTES), MAX_FLUSH_BYTES), reason


class CacheFlush:
    """A buffer on the backend's device; calling the object flushes the cache and waits for the device."""

    def __init__(self, backend: Backend) -> None:
        self.bytes, reason = sweep(backend)
        self.method = (
            f"{size(self.bytes, '-', 'MiB', 'g')} read and written before every timed forward, {reason}"
        )
        self._buffer = torch.zeros(self.bytes // 4, dtype=torch.float32, device=backend.device)

    def __call__(self) -> None:
        """Flush. Nothing of the backend is called: it could warm the cache again."""
        self._buffer.add_(1)
        self._buffer[-1].to("cpu")  # waits for the sweep, in the order of the stream
