"""The runner's own clocks, bound before any plugin loads."""

from __future__ import annotations

import time
from collections.abc import Callable

now_ns: Callable[[], int] = time.perf_counter_ns
cpu_ns: Callable[[], int] = time.process_time_ns  # of all threads of this process
system_ns, MONOTONIC = time.clock_gettime_ns, time.CLOCK_MONOTONIC
