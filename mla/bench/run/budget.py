"""The time a run may take, and how well the estimates held that decide what still fits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class Budget:
    """Seconds from now on, or no limit. Estimates are corrected by how long earlier scenarios took."""

    def __init__(self, seconds: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self.before: float | None = None  # seconds until `left` was first asked for
        self._clock = clock
        self._end = math.inf if seconds is None else clock() + seconds
        self._estimated = self._taken = 0.0

    def left(self) -> float:
        """Return the seconds that are left; negative once the time is over."""
        left = self._end - self._clock()
        if self.before is None and self.seconds is not None:
            self.before = self.seconds - left
        return left

    @property
    def learned(self) -> bool:
        """Whether estimates are corrected by what earlier work took."""
        return self._estimated > 0

    def corrected(self, estimate: float) -> float:
        """Return an estimate, scaled by how far earlier ones were off."""
        return estimate * self._taken / self._estimated if self._estimated else estimate

    def fits(self, estimate: float) -> bool:
        """Return whether work with this estimate, in seconds, still fits."""
        left = self.left()
        return left > 0 and self.corrected(estimate) <= left

    def learn(self, estimate: float, taken: float) -> None:
        """Record how long work took."""
        self._estimated += estimate
        self._taken += taken


class Pace:
    """Decides before every pass whether another one fits: by an estimate, then by how long passes took."""

    def __init__(self, budget: Budget, estimate: float) -> None:
        self._budget, self._estimate = budget, estimate
        self._longest = 0.0
        self._left_before: float | None = None

    def restart(self) -> None:
        """Forget when the last pass began: what follows it is something else."""
        self._left_before = None

    def over(self) -> bool:
        """Return whether another pass would not fit; called before every one."""
        left = self._budget.left()
        if self._left_before is not None:
            self._longest = max(self._longest, self._left_before - left)
        self._left_before = left
        return left < (self._longest or self._budget.corrected(self._estimate))
