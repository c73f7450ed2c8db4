"""Timing on the device's own clock, through events of its torch module."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

# Cycles that the device is kept busy before the first event: 50 us at 2 GHz, longer than a host takes to
# launch an op from Python, or a graph.
LEAD_CYCLES = 100_000


class EventTimer:
    """Time between two events in the current stream: what the device spent, launch gaps included.

    The device is kept busy before the first event, where its module has a `_sleep`: on an idle stream the
    event would take place at once, and the time the host takes to launch the first op would count. Launches
    of those first 50 us or so do not count; later ones do, if the device waits for them. This is not a
    headline number (`Backend.timer`).
    """

    def __init__(self, module: ModuleType, device_type: str, synchronize: Callable[[], None]) -> None:
        self.clock = f"{device_type} events"
        self._synchronize = synchronize
        self._first, self._last = (module.Event(enable_timing=True) for _ in range(2))
        self._keep_busy = _lead(module)

    def start(self) -> None:
        self._synchronize()
        self._keep_busy(LEAD_CYCLES)
        self._first.record()

    def stop(self) -> float:
        """Return the milliseconds since `start`, all submitted work included."""
        self._last.record()
        self._synchronize()
        return float(self._first.elapsed_time(self._last))


def _lead(module: ModuleType) -> Callable[[int], None]:
    """Return what keeps the device busy for some cycles; nothing does where the stack has no such kernel."""
    sleep: Callable[[int], None] | None = getattr(module, "_sleep", None)
    try:
        if sleep is not None:
            sleep(1)
            module.synchronize()
            return sleep
    except Exception:  # noqa: BLE001  # vendor stacks raise anything; without it a launch counts, no more
        pass
    return lambda cycles: None
