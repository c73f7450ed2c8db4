"""Seconds per call, as the growth from N to 2N calls: what a region costs whatever it holds drops out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter_ns as now_ns


# How long regions are repeated, the fewest repetitions, and the time after which even those are cut short.
SECONDS, REPEATS, MOST_SECONDS = 0.02, 3, 0.2
# Seconds by which 2N calls must take longer than N, unless the longer region takes LONGEST already.
GROWTH, LONGEST = 2e-4, 5e-2
# The longer region takes at least so many times as long: a constant cost is then no more than the work.
RATIO = 1.5
# Calls that take longer are not repeated beyond a second try.
LONG_CALL = 0.25
MOST_CALLS = 4096

Region = Callable[[int], float]  # number of calls -> seconds


class _Shortest:
    """The shortest time of a region; one that waited for a CPU counts only if there is no other."""

    def __init__(self, region: Region, calls: int) -> None:
        self._region, self._calls = region, calls
        self._undisturbed = self._disturbed = float("inf")

    def run(self) -> float:
        """Run the region once more and return the shortest time."""
        disturbance = clock.Disturbance()
        seconds = self._region(self._calls)
        if disturbance.spoils(1e3 * seconds):
            self._disturbed = min(self._disturbed, seconds)
        else:
            self._undisturbed = min(self._undisturbed, seconds)
        return self.seconds

    @property
    def reliable(self) -> bool:
        """Whether any run was undisturbed."""
        return self._undisturbed < float("inf")

    @property
    def seconds(self) -> float:
        return self._undisturbed if self.reliable else self._disturbed


def per_call(region: Region, most_calls: int = MOST_CALLS, enough: float = float("inf")) -> float:
    """Return the seconds of one call. More than `enough` need not be exact.

    Regions are repeated; the shortest of N and of 2N calls count, because noise only adds. The growth is
    that of undisturbed regions: a disturbed one of N calls would make it too small, and so a limit too high.
    Without any, a region's plain seconds per call count.
    """
    once = region(1)  # loads kernels and touches pages
    if once > LONG_CALL:
        return min(once, region(1))
    calls, short, long = _size(region, most_calls)
    end, done = now_ns() + 1e9 * SECONDS, 1
    last = now_ns() + 1e9 * MOST_SECONDS
    while (done < REPEATS or now_ns() < end) and now_ns() < last:
        if done >= 2 and long.seconds / (2 * calls) > enough:
            break
        short.run(), long.run()
        done += 1
    if short.reliable and long.reliable:
        return grown(short.seconds, long.seconds, calls)
    return plain(short.seconds, long.seconds, calls)


def _size(region: Region, most_calls: int) -> tuple[int, _Shortest, _Shortest]:
    """Return N, large enough for the growth to be measured, and the regions of N and of 2N calls."""
    calls = 1
    while True:
        short, long = _Shortest(region, calls), _Shortest(region, 2 * calls)
        lower, upper = short.run(), long.run()
        clear = upper - lower >= GROWTH and upper >= RATIO * lower
        if clear or upper >= LONGEST or 8 * calls > most_calls:
            return calls, short, long
        calls *= 4


def plain(short: float, long: float, calls: int) -> float:
    """Return the seconds per call of a region, which include what is constant: the truth is no larger."""
    return min(short, long / 2) / calls


def grown(short: float, long: float, calls: int) -> float:
    """Return the seconds per call from those of regions of `calls` and of twice as many.

    At most the plain ones, and at least half of them: noise cannot make it absurd.
    """
    most = plain(short, long, calls)
    return max(min((long - short) / calls, most), most / 2)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Turn Python's garbage collector off inside the `with` block, as it is while forwards are timed."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
