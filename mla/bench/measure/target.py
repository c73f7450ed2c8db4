"""The time that a scenario should take: what comes beside its headline gives way first, then passes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from mla.bench.measure import evidence, new_lengths
from mla.bench.results.cases import LEFT_OUT

if TYPE_CHECKING:
    from mla.bench.measure.passes import PassRunner

# Seconds that a scenario should take, and seconds after which no further pass of it begins.
SECONDS, MOST = 30.0, 75.0
# What takes no longer is not left out, however late it is: a first forward may compile for a minute.
CHEAP = 2.0
# Passes that the first of them leaves at least: as many as an interval needs.
FEWEST = 6
# Times as long as its forwards a pass takes, with all that goes with it, until one has been timed.
WHOLE = 1.25
NO_TIME = f"{LEFT_OUT}a scenario should end in about {SECONDS:.0f} s"


class Target:
    """Two limits from now on: `seconds` for what may be left out, and `most` for passes. By default none."""

    def __init__(
        self,
        seconds: float = math.inf,
        most: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Both limits count from now on, by `clock`."""
        self._seconds, self._most, self.now = seconds, most, clock
        self._end, self._last = clock() + seconds, clock() + most

    def prepared(self) -> None:
        """Leave at least half of the time to what follows: an oracle may have taken all of it."""
        self._end = max(self._end, self.now() + self._seconds / 2)

    def begun(self) -> None:
        """Leave time to what costs little: first forwards may have taken all of it."""
        self._end = max(self._end, self.now() + CHEAP)

    def checked(self) -> None:
        """Leave at least half of the time to passes: what precedes them may have taken all of it."""
        self.begun()
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
        self, target: Target, prefill: bool, asked: bool, first: str, right: Callable[[PassRunner], bool]
    ) -> None:
        """`asked`: the user asked for the variants. `first`: the run's first implementation, maybe not here.

        `right` tells whether a runner's outputs are, so far.
        """
        self._target, self._prefill, self._asked, self._right = target, prefill, asked, right
        self._first = first
        self.headlines: list[PassRunner] = []
        self.variants: list[PassRunner] = []  # whose passes all fit
        self.cut: dict[PassRunner, int] = {}  # for which no time was left -> passes of the first by then
        self.taken: dict[PassRunner, list[float]] = {}  # seconds of passes, with all that goes with them
        self.each: dict[PassRunner, float] = {}  # seconds of a headline's forward

    def first(self) -> list[PassRunner]:
        """Return the headline of the first implementation; nothing if it does not run here."""
        return [one for one in self.headlines if one.implementation.name == self._first]

    def spare(self) -> float:
        """Return the seconds that are left beside the evidence and all passes of the headlines."""
        return self._target.spare() - self._evidence() - self._due(self.headlines)

    def forwards(self, runner: PassRunner, implementations: int) -> float:
        """Return how many timed forwards of one of so many implementations fit, its evidence aside."""
        seconds, each = max(self.spare(), CHEAP) / implementations, self.each.get(runner) or 1e-9
        return (seconds / each - self._evidence_forwards(runner)) / WHOLE

    def variant_fits(self, runner: PassRunner, forward: float) -> bool:
        """Return whether all passes of a variant fit beside those that do already.

        Its forwards take about `forward` seconds, if none was run.
        """
        seconds = self.seconds(runner) or 2 * forward * len(runner.steps.run)
        own = runner.steps.passes * seconds + self._evidence_of(runner)
        return self._asked or own <= self.spare() - self._due(self.variants)

    def new_lengths_fit(self, runner: PassRunner) -> bool:
        """Return whether forwards on new lengths fit, which follow the passes of a headline."""
        return self.new_lengths(runner) < CHEAP or self._target.spare() > new_lengths.SECONDS

    def another(self, runner: PassRunner) -> bool:
        """Return whether another pass fits; every headline has one. What does not fit is cut for good."""
        if runner not in self.cut and not self._fits(runner):
            self.cut[runner] = sum(len(one.passes) for one in self.first())
        return runner not in self.cut

    def _fits(self, runner: PassRunner) -> bool:
        target, seconds, done, first = self._target, self.seconds(runner), len(runner.passes), self.first()
        if runner not in self.headlines:
            return self._asked or seconds <= self.spare()
        whole = runner in first and self._prefill  # the forwards of a headline, in however many passes
        if done >= FEWEST and not whole and seconds > target.spare() - self._evidence():
            return False
        ahead = 0.0 if runner in first else self._due(first)
        return not done or seconds <= target.left() - self._evidence() - ahead

    def seconds(self, runner: PassRunner) -> float:
        """Return the seconds that another pass takes, an idle one before it included."""
        if taken := self.taken.get(runner):
            return fmean(taken)
        return WHOLE * len(runner.steps.run) * self.each.get(runner, 0.0)

    def ending(self, runner: PassRunner) -> float:
        """Return the seconds of another pass, with all evidence that follows the last one."""
        others = [one for one in [*self.headlines, *self.variants] if one.passes and one is not runner]
        return self.seconds(runner) + sum(map(self._evidence_of, [runner, *filter(self._right, others)]))

    def promised(self) -> float:
        """Return the seconds of a pass of the first implementation with its evidence, until it had one."""
        due = [one for one in self.first() if not one.passes and self._right(one)]
        return sum(map(self.ending, due))

    def new_lengths(self, runner: PassRunner) -> float:
        """Return the seconds of forwards on new lengths."""
        return self.each.get(runner, 0.0) * new_lengths.TUPLES * (1 + new_lengths.AGAIN)

    def _due(self, runners: Sequence[PassRunner]) -> float:
        """Return the seconds of all passes that are still due of these."""
        right = [one for one in runners if self._right(one)]
        return sum((one.steps.passes - len(one.passes)) * self.seconds(one) for one in right)

    def _evidence(self) -> float:
        """Return the seconds of all evidence, which follows the passes."""
        right = [one for one in [*self.headlines, *self.variants] if self._right(one)]
        return sum(self._evidence_of(one) for one in right)

    def _evidence_of(self, runner: PassRunner) -> float:
        each = self.seconds(runner) / max(1, len(runner.steps.run))  # of a variant
        return self._evidence_forwards(runner) * self.each.get(runner, each)

    def _evidence_forwards(self, runner: PassRunner) -> int:
        """Return how many forwards the evidence of a variant has: on inputs that nothing has seen.

        Those and their oracle are made before time is shared out.
        """
        return evidence.forwards(runner.steps, self._prefill) + 2  # one before, and one for loading them
