"""Waiting and timing: a number is worth nothing if the clock stops before the work does.

Every bound is wide, and the best or the median of several attempts counts, so that a busy host changes no
verdict: a clock that does not wait is off by far more.
"""

from __future__ import annotations

import functools
import statistics
import time

from mla.conformance.problems.load import ATTEMPTS, MatmulLoad, best, elapsed, load_of, usual
from mla.conformance.registry import check
from mla.conformance.trial import Trial, expect

SLACK = 1.05  # two clocks may drift apart by this factor
RESOLUTION_MS = 0.1
ROUNDS = 3  # a host whose CPUs others want spoils one, but not all
UNITS = (1, 4, 16)  # of work: in little of it, a wait that polls may hide that it grows


@check(
    "device.synchronize", catches="a synchronize() that does nothing, which makes every timing a launch time"
)
def synchronize(trial: Trial) -> None:
    """No work is left to wait for after synchronize()."""
    work = load_of(trial.subject)

    def left() -> float:
        """Return the share of the time that passes only after synchronize()."""
        work.read()
        start = time.perf_counter()
        work.submit(8)
        trial.backend.synchronize()
        waited = 1e3 * (time.perf_counter() - start)
        after = elapsed(work.read)
        return after / (waited + after)

    share = 1.0
    for _ in range(ROUNDS):
        share = usual(left)
        if share < 0.5:
            break
    expect(share < 0.5, f"{share:.0%} of the time passed after synchronize() had returned")


@check("device.timer", catches="a timer that does not wait, or reports another unit than milliseconds")
def timer(trial: Trial) -> None:
    """The timer covers all submitted work, in milliseconds, and never more than the time that passed."""
    work, clock = load_of(trial.subject), trial.backend.timer()
    expect(isinstance(getattr(clock, "clock", None), str), "the timer does not name its clock")
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
        expect(found <= ceiling, f"the timer says {found:.3g} ms, but only {passed:.3g} ms had passed")
        shares.append(found / passed)
    trial.note = f"{clock.clock} clock"
    share = statistics.median(shares)
    expect(share > 0.5, f"the timer covers only {share:.0%} of the time the work took")


def _timed(trial: Trial, work: MatmulLoad, units: int, pending: int = 0) -> float:
    """Return what the timer says about `units` of work, with others still pending when it starts."""
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
    """Eight times the work takes at least twice as long."""
    work = load_of(trial.subject)
    one = eight = 0.0
    units = 1
    for units in UNITS:
        one, eight = (best(functools.partial(_timed, trial, work, count)) for count in (units, 8 * units))
        if eight >= 2 * one > 0:
            break
    trial.note = f"{eight / one if one else 0:.1f}x the time for 8x the work"
    expect(one > 0, f"work of {work.milliseconds(units):.3g} ms took {one:.3g} ms")
    counts = f"{units} unit{'s' * (units > 1)} of work and {eight:.3g} ms for {8 * units}"
    expect(eight >= 2 * one, f"{one:.3g} ms for {counts}")


@check("device.timer_start", catches="a timer that counts work submitted before it was started")
def timer_start(trial: Trial) -> None:
    """Work submitted before the timer starts does not count."""
    work = load_of(trial.subject)
    alone = after = bound = 0.0
    for _ in range(ROUNDS):
        alone = best(lambda: _timed(trial, work, 1))
        after = usual(lambda: _timed(trial, work, 1, pending=16))  # not now and then alone
        bound = 6 * alone + RESOLUTION_MS
        if after <= bound:
            break
    expect(after <= bound, f"{alone:.3g} ms for work alone, {after:.3g} ms behind other work")
