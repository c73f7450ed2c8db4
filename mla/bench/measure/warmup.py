"""Warm up until latencies settle, by a bounded rule.

At least as many forwards run as were asked for. Then more, until the median of the last `WINDOW` is within
`WITHIN` of the median of the `WINDOW` before; but at most `MOST` more, and none once forwards have taken
`SECONDS`. With 0 asked for, there is no warm-up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mla.bench.measure.passes import Forwards
from mla.bench.results.stats import median

WINDOW, WITHIN = 5, 0.05
MOST, SECONDS = 100, 5.0


@dataclass(frozen=True)
class WarmupResult:
    """How a warm-up went. `settled` is None when none was asked for."""

    forwards: int = 0
    settled: bool | None = None


def warm_up(
    forwards: Forwards,
    steps: int,
    least: int,
    time_step: Callable[[int], float],
    numbers: Iterator[int],
    tick: Callable[[int], None],
) -> WarmupResult:
    """Run forwards until latencies settle; the history is restored every `steps` forwards, as in a pass.

    `time_step` runs a step and returns its milliseconds. Every pass takes the next of `numbers`. `tick` is
    called after every forward, with 1 for the first `least` forwards and 0 afterwards.
    """
    if not least:
        return WarmupResult()
    taken: list[float] = []
    while not _done(taken, least):
        index = len(taken) % steps
        if index == 0:
            forwards.restore(next(numbers))
        forwards.before(index)
        taken.append(time_step(index))
        forwards.after(index)
        tick(int(len(taken) <= least))
    return WarmupResult(len(taken), settled(taken))


def _done(taken: Sequence[float], least: int) -> bool:
    count = len(taken)
    if count < least:
        return False
    return settled(taken) or count >= least + MOST or sum(taken) >= 1e3 * SECONDS


def settled(taken: Sequence[float]) -> bool:
    """Return whether the last window of milliseconds is as fast as the one before, within `WITHIN`."""
    if len(taken) < 2 * WINDOW:
        return False
    before, now = median(taken[-2 * WINDOW : -WINDOW]), median(taken[-WINDOW:])
    return abs(now - before) <= WITHIN * before
