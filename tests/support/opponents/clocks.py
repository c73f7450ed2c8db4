"""A device's clock that lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mla_backends.api import HostTimer, Timer
from opponents.base import Opponent

# What a clock does to a millisecond.
LIES: dict[str, Callable[[float], float]] = {
    "divides by 10": lambda ms: ms / 10,
    "divides by 3": lambda ms: ms / 3,
    "says 0.69 of it": lambda ms: 0.69 * ms,
    "multiplies by 10": lambda ms: ms * 10,
    "constant": lambda ms: 0.05,
    "tells the truth": lambda ms: ms,
}


class Liar(HostTimer):
    """A timer that changes what it read."""

    def __init__(self, synchronize: Callable[[], None], lie: str, clock: str) -> None:
        super().__init__(synchronize)
        self._lie, self.clock = LIES[lie], clock

    def stop(self) -> float:
        return self._lie(super().stop())


class LyingTimer(Opponent):
    """Its device's timer lies."""

    def __init__(self, device: str, **given: Any) -> None:
        super().__init__(**given)
        self._device = device

    def device_timer(self) -> Timer | None:
        return Liar(self.synchronize, self._device, "device")
