"""The runner's own clocks, bound before any plugin loads."""

from __future__ import annotations

import glob
import time
from collections.abc import Callable

now_ns: Callable[[], int] = time.perf_counter_ns
cpu_ns: Callable[[], int] = time.process_time_ns  # of all threads of this process
system_ns, MONOTONIC = time.clock_gettime_ns, time.CLOCK_MONOTONIC

_THREADS = "/proc/self/task/*/schedstat"


def delayed_ns() -> int | None:
    """Return how long all threads of this process together were ready to run, and had no CPU.

    Linux counts it (Documentation/scheduler/sched-stats.rst, the second number); None where nobody does.
    """
    total = None
    for path in glob.glob(_THREADS):
        try:
            with open(path, "rb") as file:
                total = (total or 0) + int(file.read().split()[1])
        except (OSError, IndexError, ValueError):  # a thread that has ended meanwhile
            continue
    return total
