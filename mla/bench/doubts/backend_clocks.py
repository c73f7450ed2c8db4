"""What a backend's own clocks say of forwards, against the runner's clock.

The device's clock starts and stops elsewhere than the host's, so single readings differ by launches and
waits. But what two more forwards in one region add must be the same on both: launches, gaps and all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from mla.bench.doubts.clock import Disturbance, now_ns
from mla.bench.doubts.pass_times import PassTimes
from mla.bench.results.stats import percentile
from mla_backends.api import Backend, Timer

# How far the growth of a region may be off on one of two clocks, as a ratio.
WITHIN = 1.5
# Growth below this many milliseconds says nothing: it is within the cost of reading clocks.
LEAST = 0.02
# Forwards of a long region, and pairs of short and long ones; turns of forwards that are waited for twice.
LONG, PAIRS, TURNS = 3, 15, 20
# Forwards that others did not disturb, before a wait is doubted; nanoseconds after which none are expected.
ENOUGH, PATIENCE = 9, 20_000_000_000
# Milliseconds of a forward that a device's clock may leave out: the host launches it, and waits.
LAUNCH = 0.1
# Milliseconds after which fewer repetitions will do, and of a forward that is run once a turn.
SLOW = 500.0


def device_doubt(
    timer: Timer, forwards: Any, long: Sequence[int], restore: Callable[[], None], wait: Callable[[], None]
) -> str:
    """Return why the device's clock cannot be right, or nothing.

    `forwards` as in `Forwards`; `long` are the indices of several, of which the first is a short region.
    On the host's clock, a region ends when `wait` finds the outputs there, or else when the timer says so,
    which may look for them now and then only.
    """
    if len(long) < 2:
        return ""
    device, host = [], []
    for pair in range(PAIRS):
        restore()
        short_times = _region(timer, forwards, long[:1], wait)
        restore()
        times = _region(timer, forwards, long, wait)
        device.append(times[0] - short_times[0])
        host.append(times[1] - short_times[1])
        theirs, mine = median(device), median(host)
        told = max(theirs, mine) >= LEAST
        agree = told and mine > 0 and 1 / WITHIN <= theirs / mine <= WITHIN
        if pair >= 2 and (agree or times[1] > SLOW):  # three pairs do, unless they contradict each other
            break
    if agree or not told:
        return ""
    more = f"{len(long) - 1} more forward{'s' * (len(long) > 2)} in a region"
    return f"{more} count {theirs:.3g} ms on the clock '{timer.clock}' and {mine:.3g} ms on the host's"


def _region(
    timer: Timer, forwards: Any, indices: Sequence[int], wait: Callable[[], None]
) -> tuple[float, float]:
    """Return the milliseconds of some forwards in one region, on the timer and on the runner's clock."""
    timer.start()
    start = now_ns()
    for index in indices:
        forwards.before(index)
        forwards.step(index)
    wait()
    done = now_ns()
    is_there = _is_there(forwards)
    taken = timer.stop()
    return taken, ((done if is_there else now_ns()) - start) / 1e6


def _is_there(forwards: Any) -> bool:
    """Return whether the last forward is done, by its outputs, which are NaN until then."""
    out = getattr(forwards, "out", None)
    return out is not None and not bool(out.reshape(-1)[-1:].isnan().any())


def region_doubt(passes: Sequence[PassTimes], idle: Sequence[PassTimes]) -> str:
    """Return why the device's clock leaves out too much of its own regions, or nothing.

    What a region takes on the host beyond an empty one is work, or the launch of it.
    """
    busy = percentile([sum(one.inside) for one in passes], 25)
    empty = percentile([sum(one.inside) for one in idle], 75)
    device = median(sum(one.samples) for one in passes)
    if busy - empty <= WITHIN * device + LAUNCH * len(passes[0].samples):
        return ""
    return (
        f"its clock says {device:.3g} ms for the forwards of a pass, and the host was busy with them for "
        f"{busy - empty:.3g} ms between starting it and stopping it"
    )


def only_polls(
    passes: Sequence[PassTimes],
    forwards: Any,
    indices: Sequence[int],
    restore: Callable[[], None],
    wait: Callable[[], None],
) -> bool:
    """Return whether the device's clock agrees with when forwards are done, by a copy of their outputs.

    What the host waits in a region after that is how seldom the device's timer looks. No output is there
    before: where a copy does not wait for it, as where a backend queues what torch does not know of, this is
    no evidence.
    """
    taken = list[float]()
    for _ in range(PAIRS):
        restore()
        for index in indices:
            forwards.before(index)
            wait()
            start = now_ns()
            forwards.step(index)
            wait()
            taken.append((now_ns() - start) / 1e6)
            if not _is_there(forwards):
                return False
        if sum(taken) > SLOW:
            break
    device = [ms for one in passes for ms in one.samples]  # some of which others made slow
    return bool(taken) and min(device) / WITHIN - LAUNCH <= min(taken) <= WITHIN * median(device) + LAUNCH


def wait_doubt(
    forwards: Any,
    indices: Sequence[int],
    restore: Callable[[], None],
    synchronize: Callable[[], None],
    wait: Callable[[], None],
    allowed: float,
) -> tuple[str, float, float]:
    """Return why `synchronize` makes forwards seem slower than they are, or nothing.

    And how long one takes until it is done, and what `synchronize` adds to that, in milliseconds.

    Copying a number to the host waits for a forward first: `synchronize` then finds it done, however seldom
    it looks. That it is slow for everybody is its right: `allowed` are the milliseconds it takes when there
    is nothing to wait for, or after the backend's own ops. One wait that is short enough is believed; only
    forwards that others did not keep from running speak against it. Long ones run once a turn.
    """
    taken, rests, quiet, end = list[float](), list[float](), 0, now_ns() + PATIENCE
    for _ in range(TURNS):
        restore()
        for index in indices:
            disturbance = Disturbance()
            done, rest = _waited(forwards, index, wait, synchronize)
            quiet += not disturbance.spoils(done + rest)
            taken.append(done)
            rests.append(rest)
            if done > SLOW:
                break
        copies, rest = median(taken), min(rests)
        believed = rest - allowed <= (WITHIN - 1) * copies + LAUNCH
        if believed or quiet >= ENOUGH or now_ns() > end:
            break
    if believed or quiet < ENOUGH:
        return "", copies, rest
    takes = f"a forward takes {copies + rest:.3g} ms until `synchronize` returns"
    return f"{takes}, but is done after {copies:.3g} ms", copies, rest


def _waited(
    forwards: Any, index: int, wait: Callable[[], None], synchronize: Callable[[], None]
) -> tuple[float, float]:
    """Return the milliseconds until a forward is done, and from then on until `synchronize` returns."""
    forwards.before(index)
    wait()
    start = now_ns()
    forwards.step(index)
    wait()
    done = now_ns()
    synchronize()
    return (done - start) / 1e6, (now_ns() - done) / 1e6


def timer_doubt(backend: Backend, forwards: Any, steps: int, restore: Callable[[], None]) -> str:
    """Return how a backend's own host timer contradicts the runner's clock, which it does not replace."""
    if type(backend).timer is Backend.timer:
        return ""
    timer, taken = backend.timer(), []
    restore()
    for index in range(min(steps, PAIRS)):
        forwards.before(index)
        timer.start()
        start = now_ns()
        forwards.step(index)
        reading = timer.stop()
        taken.append((reading, (now_ns() - start) / 1e6))
        forwards.after(index)
    theirs, mine = (median(values) for values in zip(*taken, strict=True))
    if max(theirs, mine) < LEAST or (mine > 0 and 1 / WITHIN <= theirs / mine <= WITHIN):
        return ""
    return f"the backend's own timer says {theirs:.3g} ms where the runner's clock measured {mine:.3g} ms"
