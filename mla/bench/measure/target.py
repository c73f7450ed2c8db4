"""The time that a scenario should take: what comes beside its headline gives way first, then passes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mla.bench.measure.passes import PassRunner

# Seconds that a scenario should take, and seconds after which no further pass of it begins.
SECONDS, MOST = 30.0, 75.0
# Passes that the first of them leaves at least: as many as an interval needs.
FEWEST = 6
# Forwards of an implementation's evidence, which follow its passes.
EVIDENCE = 4
# Times as long as its forwards a pass takes, with all that goes with it, until one has been timed.
WHOLE = 1.25
LEFT_OUT = f"left out: a scenario should end in about {SECONDS:.0f} s"


class Target:
    """Two limits from now on: `seconds` for what may be left out, and `most` for passes. By default none."""

    def __init__(
        self,
        seconds: float = math.inf,
        most: float = math.inf,
        fewest: float = FEWEST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`fewest` passes are timed although `seconds` are over: infinitely many where the user gave one."""
        self._seconds, self._most, self.fewest, self.now = seconds, most, fewest, clock
        self._end, self._last = clock() + seconds, clock() + most

    def prepared(self) -> None:
        """Leave at least half of the time to what follows: an oracle may have taken all of it."""
        self._end = max(self._end, self.now() + self._seconds / 2)

    def checked(self) -> None:
        """Leave at least half of the time to passes: what precedes them may have taken all of it."""
        self._last = max(self._last, self.now() + self._most / 2)

    def spare(self) -> float:
        """Return the seconds that are left for what may be left out; negative once they are over."""
        return self._end - self.now()

    def left(self) -> float:
        """Return the seconds in which the last pass has to end; negative once they are over."""
        return self._last - self.now()


class Timetable:
    """What of a scenario's passes still fits: evidence and the headlines' passes come before all else."""

    def __init__(
        self, target: Target, prefill: bool, asked: bool, right: Callable[[PassRunner], bool]
    ) -> None:
        """`asked`: the user asked for the variants. `right` tells whether a runner's outputs are, so far."""
        self._target, self._prefill, self._asked, self._right = target, prefill, asked, right
        self.headlines: list[PassRunner] = []  # the one of the first implementation first
        self.cut: list[PassRunner] = []  # for which there was no time left
        self.taken: dict[PassRunner, list[float]] = {}  # seconds of passes, with all that goes with them
        self.each: dict[PassRunner, float] = {}  # seconds of a headline's forward

    def spare(self) -> float:
        """Return the seconds that are left beside the evidence and all passes of the headlines."""
        return self._target.spare() - self._reserved(len(self.headlines))

    def forwards(self, runner: PassRunner, implementations: int) -> float:
        """Return how many timed forwards of one of so many implementations fit, its evidence aside."""
        seconds = self.spare() / implementations
        return (seconds / (self.each.get(runner) or 1e-9) - EVIDENCE) / WHOLE

    def variant_fits(self, runner: PassRunner, forward: float) -> bool:
        """Return whether all passes of a variant fit, with so many seconds a forward if none was run."""
        seconds = self._seconds(runner) or 2 * forward * len(runner.steps.run)
        return self._asked or runner.steps.passes * seconds <= self.spare()

    def another(self, runner: PassRunner) -> bool:
        """Return whether another pass fits; every headline has one. What does not fit is cut for good."""
        if runner not in self.cut and not self._fits(runner):
            self.cut.append(runner)
        return runner not in self.cut

    def _fits(self, runner: PassRunner) -> bool:
        target, seconds, done = self._target, self._seconds(runner), len(runner.passes)
        if runner not in self.headlines:
            return self._asked or seconds <= self.spare()
        first = runner is self.headlines[0]
        whole = first and self._prefill  # the forwards of a headline, in however many passes
        if done >= target.fewest and not whole and seconds > target.spare() - self._reserved(0):
            return False
        return not done or seconds <= target.left() - self._reserved(0 if first else 1)

    def _seconds(self, runner: PassRunner) -> float:
        """Return the seconds that another pass takes, an idle one before it included."""
        if taken := self.taken.get(runner):
            return fmean(taken)
        return WHOLE * len(runner.steps.run) * self.each.get(runner, 0.0)

    def _reserved(self, count: int) -> float:
        """Return the seconds of all evidence, and of the passes due of the first `count` headlines."""
        right = [runner for runner in self.headlines if self._right(runner)]
        passes = sum((one.steps.passes - len(one.passes)) * self._seconds(one) for one in right[:count])
        return passes + sum(EVIDENCE * self.each.get(one, 0.0) for one in right)
