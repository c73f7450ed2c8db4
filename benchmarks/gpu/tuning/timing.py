"""How a call is timed: many in a graph, on the device's clock."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from mla_backends.api import Backend


@dataclass(frozen=True)
class Effort:
    """How long a call is timed: `calls` in a graph, replayed for `least_ms`, so many `rounds`."""

    calls: int = 10
    rounds: int = 5
    least_ms: float = 3.0
    most: int = 50  # replays of a round


def microseconds(backend: Backend, call: Callable[[], None], effort: Effort) -> float:
    """Return the time of a call on the device's clock, or on the host's without one; the median of rounds."""
    timer = backend.device_timer() or backend.timer()
    many = _graph(backend, call, effort.calls)

    def timed(replays: int) -> float:
        timer.start()
        for _ in range(replays):
            many()
        return timer.stop() / replays

    timed(1)
    replays = min(effort.most, max(1, math.ceil(effort.least_ms / max(timed(1), 1e-6))))
    return statistics.median(timed(replays) for _ in range(effort.rounds)) * 1e3 / effort.calls


def _graph(backend: Backend, call: Callable[[], None], calls: int) -> Callable[[], None]:
    """Return a function that makes so many calls: from a graph, where the device has them."""

    def several() -> None:
        for _ in range(calls):
            call()

    several()
    try:
        return backend.graph(several) or several
    except Exception:  # noqa: BLE001  # a stack raises anything when it cannot capture
        return several
