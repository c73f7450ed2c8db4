"""Clocks that lie."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from mla_backends.api import HostTimer, Timer
from opponents.base import Opponent

# What a clock does to a millisecond.
LIES: dict[str, Callable[[float], float]] = {
    "divides by 10": lambda ms: ms / 10,
    "divides by 3": lambda ms: ms / 3,
    "multiplies by 10": lambda ms: ms * 10,
    "takes off 0.2 ms": lambda ms: max(ms - 0.2, 1e-3),
    "constant": lambda ms: 0.05,
    "divides by 10 while nothing is collected": lambda ms: ms if gc.isenabled() else ms / 10,
    "tells the truth": lambda ms: ms,
}


class Liar(HostTimer):
    """A host timer that changes what it read."""

    def __init__(self, synchronize: Callable[[], None], lie: str, clock: str = "host") -> None:
        super().__init__(synchronize)
        self._lie, self.clock = LIES[lie], clock

    def stop(self) -> float:
        return self._lie(super().stop())


class LyingTimer(Opponent):
    """Its host timer, or its device's, lies."""

    def __init__(self, host: str = "", device: str = "", **given: Any) -> None:
        super().__init__(**given)
        self._host, self._device = host, device

    def timer(self) -> Timer:
        return Liar(self.synchronize, self._host) if self._host else super().timer()

    def device_timer(self) -> Timer | None:
        return Liar(self.synchronize, self._device, "device") if self._device else None


class PatchedClock(Opponent):
    """Replaces clocks of the process by one that runs `rate` times as fast, when it is set up.

    `late`: not before the first op is called.
    """

    def __init__(self, names: tuple[str, ...], rate: float, late: bool = False, **given: Any) -> None:
        super().__init__(**given)
        self._names, self._rate, self._late, self._done = names, rate, late, False

    def arrives(self) -> None:
        if not self._late:
            self._patch()

    def begins(self) -> None:
        if self._late and not self._done:
            self._patch()

    def _patch(self) -> None:
        self._done = True
        for name in self._names:
            right = getattr(time, name)
            number = int if name.endswith("_ns") else float
            self.patches.enter_context(
                patch.object(time, name, lambda right=right, number=number: number(right() * self._rate))
            )
