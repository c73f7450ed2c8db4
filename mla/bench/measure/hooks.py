"""What the engine asks and tells while it works: when to stop, and that it is alive. Never while it times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """By default the engine is never stopped, and nobody watches it."""

    over: Callable[[], bool] | None = None  # asked before every timed pass: no further one is to start
    enter: Callable[[str], None] = lambda name: None  # the implementation that runs from now on
    beat: Callable[[], None] = lambda: None  # called between forwards
