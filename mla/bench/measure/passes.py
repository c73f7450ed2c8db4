"""A lane's passes: forwards from a restored history, timed one by one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Protocol

from mla.bench.measure.samples import Series
from mla.bench.measure.variants import Steps
from mla.bench.subjects.base import Implementation
from mla.errors import MLAError
from mla_backends.api import Timer


class ClockError(MLAError):
    """A timer that cannot have measured anything."""

    exit_code = 3


class Forwards(Protocol):
    """What a lane runs: an implementation as it is, or its captured forwards. Only `step` is timed."""

    def restore(self) -> None: ...

    def before(self, index: int) -> None: ...

    def step(self, index: int) -> None: ...

    def after(self, index: int) -> None: ...


class Lane:
    """One way of timing one implementation."""

    def __init__(
        self,
        implementation: Implementation,
        forwards: Forwards,
        timer: Timer,
        sweep: Callable[[], None] | None,
        steps: Steps,
        series: Series,
    ) -> None:
        self.implementation, self.steps, self.series = implementation, steps, series
        self.forwards = forwards
        self._timer = timer
        self._sweep = sweep

    @property
    def complete(self) -> bool:
        """Say whether all passes were timed."""
        return len(self.series.passes) == self.steps.passes

    def rewarm(self) -> None:
        """Bring back to the caches what another lane has displaced; a cold lane has no use for it."""
        if self._sweep is None:
            self.forwards.restore()
            self.forwards.before(0)
            self.forwards.step(0)
            self.forwards.after(0)

    def try_pass(self, beat: Callable[[], None]) -> None:
        """Run a pass as it will be timed, without a clock; `beat` is called after every forward."""
        self._pass(_NoClock(), beat)

    def time_pass(self, beat: Callable[[], None]) -> list[float]:
        """Return the milliseconds of a pass's timed forwards. Raises `ClockError` for what cannot be."""
        samples = self._pass(self._timer, beat)
        if not (math.isfinite(sum(samples)) and statistics.median(samples) > 0):
            clock = self._timer.clock
            raise ClockError(f"the {clock} clock of this backend measured {samples[0]} ms for a forward.")
        return samples

    def _pass(self, timer: Timer, beat: Callable[[], None]) -> list[float]:
        forwards, timed, sweep = self.forwards, self.steps.timed, self._sweep
        samples = []
        forwards.restore()
        self.implementation.outputs.fill_(math.nan)  # so that the next check sees this pass alone
        for index in self.steps.run:
            forwards.before(index)
            if index in timed:
                if sweep is not None:
                    sweep()
                timer.start()
                forwards.step(index)
                samples.append(timer.stop())
            else:
                forwards.step(index)
            forwards.after(index)
            beat()
        return samples


class _NoClock:
    """Stands in for a timer where nothing is timed."""

    clock = "none"

    def start(self) -> None:
        pass

    def stop(self) -> float:
        return 0.0
