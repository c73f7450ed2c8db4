"""The runner's own clock, bound before any plugin loads."""

from __future__ import annotations

import time
from collections.abc import Callable

now_ns: Callable[[], int] = time.perf_counter_ns
cpu_ns: Callable[[], int] = time.process_time_ns
_clock_ns, _MONOTONIC = time.clock_gettime_ns, time.CLOCK_MONOTONIC

# The relative difference of two clocks of one machine above which one of them is wrong.
WITHIN = 0.02
# The least time between two readings that are compared, in nanoseconds: below, the readings themselves count.
LEAST = 20_000_000


class SecondOpinion:
    """Compares the runner's clock with the system's, from when the object is made."""

    def __init__(self) -> None:
        self._start = (now_ns(), _clock_ns(_MONOTONIC))

    def doubt(self) -> str:
        """Return why the clock cannot be right, or nothing."""
        ours, systems = now_ns() - self._start[0], _clock_ns(_MONOTONIC) - self._start[1]
        if systems < LEAST or abs(ours / systems - 1) <= WITHIN:
            return ""
        return f"the process's clock advanced by {ours / 1e9:.3g} s while the system's did by {systems / 1e9:.3g} s"
