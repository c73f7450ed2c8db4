"""Timing on the device's own clock, through events of its torch module."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType


class EventTimer:
    """Time between two events in the current stream: what the device spent, launch gaps included.

    Host work before the first kernel does not count, so this is not a headline number (`Backend.timer`).
    """

    def __init__(self, module: ModuleType, device_type: str, synchronize: Callable[[], None]) -> None:
        self.clock = f"{device_type} events"
        self._synchronize = synchronize
        self._first, self._last = (module.Event(enable_timing=True) for _ in range(2))

    def start(self) -> None:
        self._synchronize()
        self._first.record()

    def stop(self) -> float:
        """Return the milliseconds since `start`, all submitted work included."""
        self._last.record()
        self._synchronize()
        return float(self._first.elapsed_time(self._last))
