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


def per_call(region: Region, most_calls: int = MOST_CALLS, enough: float = float("inf")) -> float:
    """Return the seconds of one call. More than `enough` need not be exact.

    Regions are repeated; the shortest of N and of 2N calls count, because noise only adds.
    """
    once = region(1)  # loads kernels and touches pages
    if once > LONG_CALL:
        return min(once, region(1))
    calls, short, long = _size(region, most_calls)
    end, done = now_ns() + 1e9 * SECONDS, 1
    last = now_ns() + 1e9 * MOST_SECONDS
    while (done < REPEATS or now_ns() < end) and now_ns() < last:
        if done >= 2 and long / (2 * calls) > enough:
            break
        short, long = min(short, region(calls)), min(long, region(2 * calls))
        done += 1
    return grown(short, long, calls)


def _size(region: Region, most_calls: int) -> tuple[int, float, float]:
    """Return N, large enough for the growth to be measured, and the seconds of N and of 2N calls."""
    calls = 1
    while True:
        short, long = region(calls), region(2 * calls)
        clear = long - short >= GROWTH and long >= RATIO * short
        if clear or long >= LONGEST or 8 * calls > most_calls:
            return calls, short, long
        calls *= 4


def grown(short: float, long: float, calls: int) -> float:
    """Return the seconds per call from those of regions of `calls` and of twice as many.

    Where the longer region takes less than `RATIO` times as long, as if the shorter ones alone were
    disturbed, what is constant cannot be told from noise, and counts.
    """
    grew = long - short if long >= RATIO * short else long
    return min(grew, short, long / 2) / calls


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
