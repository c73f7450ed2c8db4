"""The time of a run: its limit, and a device that hangs: no forward finishes for a long time. Needs no torch.

A call into a driver cannot be interrupted, so the only way out is the end of the process. The thread sleeps;
the timed path is not touched, since the engine reports progress between timed regions.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mla.bench.workload.scenario import spoken

OVER_BUDGET = "skipped by --budget"
# Looks per limit; a hang is noticed at most one look late.
LOOKS = 4

Hung = Callable[[str, str], None]  # scenario, implementation


class Budget:
    """Seconds from now on, or no limit."""

    def __init__(self, seconds: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._end = math.inf if seconds is None else clock() + seconds

    def left(self) -> float:
        """Return the seconds that are left; negative once the time is over."""
        return self._end - self._clock()

    def short(self, seconds: float, what: str = "another pass") -> str:
        """Return why work of so many seconds is not begun; "" if it still fits."""
        left = self.left()
        if self.seconds is None or (left > 0 and seconds <= left):
            return ""
        needs = f"{what} would take about {spoken(seconds)}, and " if seconds else ""
        return f"{OVER_BUDGET}: {needs}{spoken(max(left, 0.0))} of {spoken(self.seconds)} were left"


class Watchdog:
    """Calls `hung` from a thread of its own when nothing happens for `limit` seconds while `watching`."""

    def __init__(self, limit: float, hung: Hung) -> None:
        self._limit, self._hung = limit, hung
        self._beats = 0
        self._scenario: str | None = None
        self.implementation = ""  # that runs, or ran last
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    @contextmanager
    def watching(self, scenario: str) -> Iterator[None]:
        """Expect forwards to finish inside this block: not while the host computes the oracle."""
        self._beats += 1
        self._scenario = scenario
        try:
            yield
        finally:
            self._scenario = None

    def enter(self, implementation: str) -> None:
        """Record which implementation runs."""
        self.implementation = implementation
        self.beat()

    def beat(self) -> None:
        """Record that a forward has finished."""
        self._beats += 1

    def _watch(self) -> None:
        seen, quiet = -1, 0
        while not self._done.wait(self._limit / LOOKS):
            scenario = self._scenario
            quiet = quiet + 1 if scenario is not None and seen == self._beats else 0
            seen = self._beats
            if scenario is not None and quiet >= LOOKS:
                self._hung(scenario, self.implementation)
                return
