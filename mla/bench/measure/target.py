"""The time that a scenario should take: what comes beside its headline gives way first, then passes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING

from mla.bench.measure import evidence
from mla.bench.measure.variants import EXTRA_PASSES, HEADLINE, Steps, Variant, steps
from mla.bench.results.cases import LEFT_OUT, MIN_SHARED_STEPS
from mla.bench.workload.scenario import Scenario

if TYPE_CHECKING:
    from mla.bench.measure.passes import PassRunner

# Seconds that a scenario should take, and seconds after which no further pass of it begins.
TARGET_S, MAX_S = 30.0, 75.0
# What takes no longer is not left out, however late it is: a first forward may compile for a minute.
CHEAP_S = 2.0
# Passes that are left at least: as many as an interval needs.
MIN_PASSES = EXTRA_PASSES
# Times as long as its forwards a pass takes, with all that goes with it, until one has been timed.
WHOLE = 1.25
NO_TIME = f"{LEFT_OUT}a scenario should end in about {TARGET_S:.0f} s"


class Target:
    """Two limits from now on: `seconds` for what may be left out, and `most` for passes. By default none."""

    def __init__(
        self, seconds: float = math.inf, most: float = math.inf, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Both limits count from now on, by `clock`."""
        self._seconds, self._most, self.now = seconds, most, clock
        self._end, self._last = clock() + seconds, clock() + most

    def leave_half(self) -> None:
        """Leave at least half of the time to what follows: an oracle, or checks, may have taken all of it."""
        self._end = max(self._end, self.now() + self._seconds / 2)
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
        self.cut: list[PassRunner] = []  # for which no time was left

    def is_first(self, runner: PassRunner) -> bool:
        """Whether this is the headline of the first implementation."""
        return runner.headline and runner.implementation.name == self._first

    def spare(self) -> float:
        """Return the seconds that are left beside the evidence and all passes of the headlines."""
        return self._target.spare() - self._all_evidence() - self._due(self.headlines)

    def forwards(self, runner: PassRunner, implementations: int) -> float:
        """Return how many timed forwards of one of so many implementations fit, its evidence aside."""
        seconds = max(self.spare(), CHEAP_S) / implementations - self._evidence(runner)
        return seconds / (WHOLE * runner.forward_s) if runner.forward_s else math.inf

    def variant_fits(self, runner: PassRunner, forward: float) -> bool:
        """Return whether all passes of a variant fit beside those that do already.

        Its forwards take about `forward` seconds, if none was run.
        """
        seconds = pass_seconds(runner) or 2 * forward * len(runner.steps.run)
        needed = runner.steps.passes * seconds + self._evidence(runner)
        return self._asked or needed <= self.spare() - self._due(self.variants)

    def new_lengths_fit(self, runner: PassRunner) -> bool:
        """Return whether forwards on new lengths fit, which follow the passes of a headline."""
        return evidence.new_lengths_s(runner) < CHEAP_S or self._target.spare() > evidence.TUPLES_S

    def another(self, runner: PassRunner) -> bool:
        """Return whether another pass fits; every headline has one. What does not fit is cut for good."""
        if runner not in self.cut and not self._fits(runner):
            self.cut.append(runner)
        return runner not in self.cut

    def _fits(self, runner: PassRunner) -> bool:
        passes, first = len(runner.passes), self.is_first(runner)
        if not runner.headline:
            return self._asked or pass_seconds(runner) <= self.spare()
        whole = first and self._prefill  # the forwards of a headline, in however many passes
        if passes >= MIN_PASSES and not whole and self.ending(runner) > self._target.spare():
            return False
        ahead = 0.0 if first else self._due(filter(self.is_first, self.headlines))
        return not passes or self.ending(runner) + ahead <= self._target.left()

    def ending(self, runner: PassRunner) -> float:
        """Return the seconds of another pass, with all evidence that follows the last one."""
        return pass_seconds(runner) + self._all_evidence()

    def _due(self, runners: Iterable[PassRunner]) -> float:
        """Return the seconds of all passes that are still due of these."""
        right = filter(self._right, runners)
        return sum((runner.steps.passes - len(runner.passes)) * pass_seconds(runner) for runner in right)

    def _all_evidence(self) -> float:
        return sum(map(self._evidence, filter(self._right, [*self.headlines, *self.variants])))

    def _evidence(self, runner: PassRunner) -> float:
        """Return the seconds of a variant's evidence: on new inputs, one forward before, and loading them.

        Those inputs and their oracle are made before time is shared out.
        """
        each = runner.forward_s or pass_seconds(runner) / max(1, len(runner.steps.run))
        return (evidence.forwards(runner.steps, self._prefill) + 2) * each


def pass_seconds(runner: PassRunner) -> float:
    """Return the seconds that another pass takes, an idle one before it included."""
    if runner.seconds:
        return fmean(runner.seconds)
    return WHOLE * len(runner.steps.run) * runner.forward_s


# ------------------------------------------------------------------------------------------- slow yardsticks

# Fewer and shorter passes for a yardstick that is much slower than what it is there to judge.
#
# The first implementation of a run is the one in question; the others are what it is compared with. On a CPU
# without bf16 instructions a forward of the reference ops takes ten times as long as one of ours, and would
# take nearly all of the run. Such a yardstick is timed in the headline's way alone. Its passes become fewer,
# but never too few for an interval, and then shorter: fewer of the forwards of a prefill, which are alike, or
# the first steps of a decode. The cache grows in those, so ratios are formed from the same steps of both
# (`mla.bench.results.cases`). Any other implementation than the first runs less for lack of time as well.

# Seconds beyond which a yardstick is cut, or a share of what the first implementation takes; and the part of
# them that its timed passes may take then.
BASELINE_S, SHARE, LEFT = 5.0, 0.25, 0.6
# Seconds beyond which a baseline is cut that nobody asked for, however fast it is.
ADDED_S = 2.5
# Forwards beside the timed ones: checks, warm-ups, evidence.
EXTRA_FORWARDS = 60
# A yardstick that takes fewer times as long as the first implementation keeps all of its forwards.
MUCH_SLOWER = 2.0
# Steps of a decode pass that are left at least: its cache grows, and ratios leave out the first one.
MIN_STEPS = MIN_SHARED_STEPS


def shortened(
    scenario: Scenario,
    variants: Sequence[Variant],
    first_ms: float,
    ms: float,
    most: float = math.inf,
    added: bool = False,
) -> Steps | None:
    """Return what an implementation runs, in the headline's way alone, if that is less than planned.

    `first_ms`, `ms`: milliseconds of a forward of the first implementation, and of this one in its warm-up.
    It keeps what is planned if its forwards take no more than `BASELINE_S` in all, or `SHARE` of those of the
    first implementation, or if it cannot run less; unless time allows only for `most` forwards of the
    headline. One that was `added` to what was asked for gets `ADDED_S`, slow or not.
    """
    counts = [steps(variant, scenario) for variant in variants]
    planned = EXTRA_FORWARDS + sum(count.passes * len(count.run) for count in counts)
    allowed = math.inf
    if added:
        allowed = 1e3 * ADDED_S / ms
    elif ms >= MUCH_SLOWER * first_ms:
        allowed = max(1e3 * BASELINE_S, SHARE * planned * first_ms) / ms
    cut, whole = planned > allowed, steps(HEADLINE, scenario)
    fewer = _fitting(whole, scenario, min(most, LEFT * allowed if cut else math.inf))
    return fewer if (cut and len(variants) > 1) or fewer != whole else None


def _fitting(whole: Steps, scenario: Scenario, allowed: float) -> Steps:
    """Return a headline in `allowed` forwards: first with fewer passes, and then with shorter ones."""
    count = len(whole.run)
    allowed = min(allowed, whole.passes * count)
    passes = min(whole.passes, max(MIN_PASSES, math.floor(allowed / count)))
    least = min(count, MIN_STEPS if scenario.mode == "decode" else 1)
    some = range(min(count, max(least, math.floor(allowed / passes))))
    return replace(whole, run=some, timed=some, passes=passes)
