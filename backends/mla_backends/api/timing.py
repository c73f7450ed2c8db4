"""Timers: how a region of work is timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol


class Timer(Protocol):
    """Times one region. `clock` labels the method in every result."""

    clock: str

    def start(self) -> None: ...

    def stop(self) -> float:
        """Return the milliseconds since `start`, all submitted work included."""
        ...


class HostTimer:
    """Host wall clock between two synchronizations: what a caller of the layer experiences."""

    clock = "host"

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self._synchronize = synchronize
        self._start = 0

    def start(self) -> None:
        self._synchronize()
        self._start = time.perf_counter_ns()

    def stop(self) -> float:
        self._synchronize()
        return (time.perf_counter_ns() - self._start) / 1e6
