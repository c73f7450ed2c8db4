"""Warm up until latencies settle: a published and bounded rule.

At least as many forwards run as were asked for. Then more, until the median of the last `WINDOW` is within
`WITHIN` of the median of the `WINDOW` before; but at most `MOST` further ones, and none after `SECONDS` of
forwards. With 0 asked for, nothing is warmed up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mla.bench.measure.passes import Forwards
from mla.bench.results.stats import median
from mla_backends.api import Timer

WINDOW, WITHIN = 5, 0.05
MOST, SECONDS = 100, 5.0


@dataclass(frozen=True)
class Warmth:
    """How a warm-up went. `settled` is None when none was asked for."""

    forwards: int = 0
    settled: bool | None = None


def warm_up(forwards: Forwards, steps: int, least: int, timer: Timer, tick: Callable[[int], None]) -> Warmth:
    """Run forwards until they settle; `steps` of them make a pass, after which the history is restored.

    `tick` is told of every forward, with 1 while fewer than `least` were done and 0 afterwards.
    """
    if not least:
        return Warmth()
    taken: list[float] = []
    while not _done(taken, least):
        index = len(taken) % steps
        if index == 0:
            forwards.restore()
        forwards.before(index)
        timer.start()
        forwards.step(index)
        taken.append(timer.stop())
        forwards.after(index)
        tick(int(len(taken) <= least))
    return Warmth(len(taken), settled(taken))


def _done(taken: Sequence[float], least: int) -> bool:
    count = len(taken)
    if count < least:
        return False
    return settled(taken) or count >= least + MOST or sum(taken) >= 1e3 * SECONDS


def settled(taken: Sequence[float]) -> bool:
    """Say whether the last window is as fast as the one before."""
    if len(taken) < 2 * WINDOW:
        return False
    before, now = median(taken[-2 * WINDOW : -WINDOW]), median(taken[-WINDOW:])
    return abs(now - before) <= WITHIN * before
