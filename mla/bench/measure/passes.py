"""Passes: forwards from a restored history, timed one by one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Protocol

from mla.bench.measure.samples import Samples
from mla.bench.measure.variants import Steps
from mla.bench.subjects.base import Implementation
from mla.errors import MLAError
from mla_backends.api import Timer


class ClockError(MLAError):
    """A timer whose readings are impossible."""

    exit_code = 3


class Forwards(Protocol):
    """The forwards of a pass: an implementation's own, or captured ones. Only `step` is timed."""

    def restore(self) -> None: ...

    def before(self, index: int) -> None: ...

    def step(self, index: int) -> None: ...

    def after(self, index: int) -> None: ...


class PassRunner:
    """Runs and times the passes of one implementation in one variant."""

    def __init__(
        self,
        implementation: Implementation,
        forwards: Forwards,
        timer: Timer,
        flush: Callable[[], None] | None,
        steps: Steps,
        samples: Samples,
    ) -> None:
        self.implementation, self.steps, self.samples = implementation, steps, samples
        self.forwards = forwards
        self._timer = timer
        self._flush = flush

    @property
    def complete(self) -> bool:
        """Whether all passes were timed."""
        return len(self.samples.passes) == self.steps.passes

    def rewarm(self) -> None:
        """Reload into the caches what another variant has evicted; pointless if they are flushed anyway."""
        if self._flush is None:
            self.forwards.restore()
            self.forwards.before(0)
            self.forwards.step(0)
            self.forwards.after(0)

    def try_pass(self, heartbeat: Callable[[], None]) -> None:
        """Run a pass as it will be timed, but untimed; `heartbeat` is called after every forward."""
        self._pass(_NoClock(), heartbeat)

    def time_pass(self, heartbeat: Callable[[], None]) -> list[float]:
        """Return the milliseconds of a pass's timed forwards. Raises `ClockError` for impossible readings."""
        times = self._pass(self._timer, heartbeat)
        if not (math.isfinite(sum(times)) and statistics.median(times) > 0):
            clock = self._timer.clock
            raise ClockError(f"the {clock} clock of this backend measured {times[0]} ms for a forward.")
        return times

    def _pass(self, timer: Timer, heartbeat: Callable[[], None]) -> list[float]:
        forwards, timed, flush = self.forwards, self.steps.timed, self._flush
        times = []
        forwards.restore()
        self.implementation.outputs.fill_(math.nan)  # so that the next check sees this pass alone
        for index in self.steps.run:
            forwards.before(index)
            if index in timed:
                if flush is not None:
                    flush()
                timer.start()
                forwards.step(index)
                times.append(timer.stop())
            else:
                forwards.step(index)
            forwards.after(index)
            heartbeat()
        return times


class _NoClock:
    """Stands in for a timer in untimed passes."""

    clock = "none"

    def start(self) -> None:
        pass

    def stop(self) -> float:
        return 0.0
