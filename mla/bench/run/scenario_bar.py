"""The part of a progress bar that belongs to one scenario."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mla.bench.plan.estimate import Estimator
from mla.bench.plan.request import ScenarioPlan

Advance = Callable[[str, float], None]  # what is running, estimated seconds done since the last call


class ScenarioBar:
    """Advances the whole bar by no more than was estimated for its scenario, and in the end by all of it."""

    def __init__(
        self, advance: Advance, place: str, nominal: Estimator, scenario: ScenarioPlan, names: Sequence[str]
    ) -> None:
        self._advance, self._place = advance, place
        self._left = nominal.seconds(scenario, names)
        self._each = sum(nominal.forward(scenario, name) for name in names) / len(names)

    def forwards(self, what: str, done: int) -> None:
        """Advance by this many forwards."""
        seconds = min(done * self._each, self._left)
        self._left -= seconds
        self._advance(f"{self._place}  {what}", seconds)

    def finish(self) -> None:
        """Advance by what was estimated but not done."""
        self._advance(self._place, self._left)
