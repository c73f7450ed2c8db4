"""Waiting and timing: a number is worth nothing if the clock stops before the work does.

Every bound is wide, and the best or the median of several attempts counts, so that a busy host changes no
verdict: a clock that does not wait is off by far more.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from mla.conformance.registry import check
from mla.conformance.trial import Subject, Trial, expect

ATTEMPTS = 5
#: Milliseconds one unit of work should take at least, and the largest matrix tried to get there.
UNIT_MS, MAX_SIZE = 2.0, 8192
#: A clock may be this much off a bracketing host clock: drift between two clocks, and their resolution.
SLACK, RESOLUTION_MS = 1.05, 0.1


class Work:
    """Matrix products that take a known time; reading a result back is the one thing that surely waits."""

    def __init__(self, subject: Subject) -> None:
        claimed = subject.backend.dtypes()
        self._dtype = torch.float32 if torch.float32 in claimed or not claimed else claimed[0]
        self._device = subject.device
        self._size = 128
        self._resize(128)
        while self.milliseconds() < UNIT_MS and self._size < MAX_SIZE:
            self._resize(2 * self._size)

    def _resize(self, size: int) -> None:
        self._size = size
        shape = (size, size)
        self._x = torch.full(shape, 1.0 / size, dtype=self._dtype, device=self._device)
        self._y = torch.empty(shape, dtype=self._dtype, device=self._device)
        self.submit()
        self.read()

    def submit(self, units: int = 1) -> None:
        """Queue work."""
        for _ in range(units):
            torch.mm(self._x, self._x, out=self._y)

    def read(self) -> None:
        """Wait, by needing the result on the host."""
        self._y[:1, :1].to("cpu", copy=True)

    def _finish(self, units: int) -> None:
        self.submit(units)
        self.read()

    def milliseconds(self, units: int = 1) -> float:
        """Return how long work takes until its result is on the host, at best."""
        return best(lambda: elapsed(lambda: self._finish(units)))


def elapsed(action: Callable[[], object]) -> float:
    """Return the milliseconds an action takes on the host's clock."""
    start = time.perf_counter()
    action()
    return 1e3 * (time.perf_counter() - start)


def best(measure: Callable[[], float], attempts: int = ATTEMPTS) -> float:
    """Return the smallest of several measurements."""
    return min(measure() for _ in range(attempts))


def usual(measure: Callable[[], float], attempts: int = ATTEMPTS) -> float:
    """Return the median of several measurements."""
    return statistics.median(measure() for _ in range(attempts))


@check(
    "device.synchronize", catches="a synchronize() that does nothing, which makes every number a launch time"
)
def synchronize(trial: Trial) -> None:
    """After synchronize() no work is left to wait for."""
    work = Work(trial.subject)

    def left() -> float:
        """Return the share of the time that passes only after synchronize()."""
        work.read()
        start = time.perf_counter()
        work.submit(8)
        trial.backend.synchronize()
        waited = 1e3 * (time.perf_counter() - start)
        after = elapsed(work.read)
        return after / (waited + after)

    share = usual(left)
    expect(share < 0.5, f"{share:.0%} of the time passed after synchronize() had returned")


@check("device.timer", catches="a timer that does not wait, or reports other units than milliseconds")
def timer(trial: Trial) -> None:
    """The timer covers all submitted work, in milliseconds, and no more than the time that passed."""
    work, clock = Work(trial.subject), trial.backend.timer()
    expect(isinstance(getattr(clock, "clock", None), str), "the timer does not say which clock it is")
    shares = []
    for _ in range(ATTEMPTS):
        work.read()
        start = time.perf_counter()
        clock.start()
        work.submit(8)
        found = clock.stop()
        work.read()  # what the timer did not wait for is waited for here
        passed = 1e3 * (time.perf_counter() - start)
        ceiling = SLACK * passed + RESOLUTION_MS
        expect(found <= ceiling, f"the timer says {found:.3g} ms, and only {passed:.3g} ms had passed")
        shares.append(found / passed)
    trial.note = f"{clock.clock} clock"
    share = statistics.median(shares)
    expect(share > 0.5, f"the timer covers {share:.0%} of the time that the work took")


def _timed(trial: Trial, work: Work, units: int, pending: int = 0) -> float:
    """Return what the timer says about so many units, with others still pending when it starts."""
    clock = trial.backend.timer()
    work.read()
    work.submit(pending)
    clock.start()
    work.submit(units)
    found = clock.stop()
    work.read()
    return float(found)


@check("device.timer_scales", catches="a timer that is blind to the work, or measures launches only")
def timer_scales(trial: Trial) -> None:
    """Eight times the work takes at least twice the time."""
    work = Work(trial.subject)
    one = best(lambda: _timed(trial, work, 1))
    eight = best(lambda: _timed(trial, work, 8))
    trial.note = f"{eight / one if one else 0:.1f} times for 8 times the work"
    expect(one > 0, f"work of {work.milliseconds():.3g} ms took {one:.3g} ms")
    expect(eight >= 2 * one, f"{one:.3g} ms for one unit of work and {eight:.3g} ms for eight")


@check("device.timer_start", catches="a timer that counts work submitted before it was started")
def timer_start(trial: Trial) -> None:
    """Work submitted before the timer starts does not count."""
    work = Work(trial.subject)
    alone = best(lambda: _timed(trial, work, 1))
    after = usual(lambda: _timed(trial, work, 1, pending=16))
    bound = 6 * alone + RESOLUTION_MS
    expect(after <= bound, f"{alone:.3g} ms for work alone and {after:.3g} ms behind other work")
