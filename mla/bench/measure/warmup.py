"""Warm up until latencies settle, by a bounded rule.

At least as many forwards run as the workload says. Then more, until the median of the last `WINDOW` is within
`WITHIN` of the median of the `WINDOW` before; but at most `MOST` more. Once the forwards after the first one,
which may compile or load what all others use, have taken `SECONDS`, no more are run, and windows are as long
as those allow; but a count that the user gave is run whatever it takes. With 0, there is no warm-up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from mla.bench.measure.passes import Forwards
from mla.bench.results.stats import median

WINDOW, WITHIN = 5, 0.05
MOST, SECONDS = 100, 2.0
# Forwards that run however long they take: the first one may make what all others use.
FEWEST = 2


@dataclass(frozen=True)
class WarmupResult:
    """How a warm-up went. `settled` is None when none was asked for, or too few were run to tell."""

    forwards: int = 0
    settled: bool | None = None
    ms: float | None = field(default=None, compare=False)  # of the fastest forward after the first one
    typical_ms: float | None = field(default=None, compare=False)  # their median


def warm_up(
    forwards: Forwards,
    steps: int,
    least: int,
    time_step: Callable[[int], float],
    numbers: Iterator[int],
    tick: Callable[[int], None],
    must: int = 0,
) -> WarmupResult:
    """Run forwards until latencies settle; the history is restored every `steps` forwards, as in a pass.

    `time_step` runs a step and returns its milliseconds. Every pass takes the next of `numbers`. `tick` is
    called after every forward, with 1 for the first `least` forwards and 0 afterwards. `must` forwards run
    however long they take.
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
