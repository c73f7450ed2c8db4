"""What a backend's own clocks say of forwards, against the runner's clock.

The device's clock starts and stops elsewhere than the host's, so single readings differ by launches and
waits. But what two more forwards in one region add must be the same on both: launches, gaps and all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from mla.bench.doubts.clock import now_ns
from mla_backends.api import Backend, Timer

# How far the growth of a region may be off on one of two clocks, as a ratio.
WITHIN = 1.5
# Growth below this many milliseconds says nothing: it is within the cost of reading clocks.
LEAST = 0.02
# Forwards of a short and of a long region, and pairs of them.
SHORT, LONG, PAIRS = 1, 3, 7


def device_doubt(timer: Timer, forwards: Any, steps: int, restore: Callable[[], None]) -> str:
    """Return why the device's clock cannot be right, or nothing. `forwards` as in `Forwards`."""
    device, host = [], []
    for _ in range(PAIRS):
        restore()
        short = _region(timer, forwards, range(min(SHORT, steps)))
        restore()
        long = _region(timer, forwards, range(min(LONG, steps)))
        device.append(long[0] - short[0])
        host.append(long[1] - short[1])
    mine, theirs = median(host), median(device)
    if mine < LEAST or (theirs > 0 and 1 / WITHIN <= theirs / mine <= WITHIN):
        return ""
    return (
        f"two more forwards take {theirs:.3g} ms on the clock '{timer.clock}' and {mine:.3g} ms on the host's"
    )


def _region(timer: Timer, forwards: Any, indices: Sequence[int]) -> tuple[float, float]:
    """Return the milliseconds of some forwards in one region, on the timer and on the runner's clock."""
    timer.start()
    start = now_ns()
    for index in indices:
        forwards.before(index)
        forwards.step(index)
        forwards.after(index)
    taken = timer.stop()
    return taken, (now_ns() - start) / 1e6


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
    if mine < LEAST or 1 / WITHIN <= theirs / mine <= WITHIN:
        return ""
    return f"the backend's own timer says {theirs:.3g} ms where the runner's clock measured {mine:.3g} ms"
