"""The runner's own clock, bound before any plugin is loaded: none can put another one in its place."""

from __future__ import annotations

import time
from collections.abc import Callable

now_ns: Callable[[], int] = time.perf_counter_ns
