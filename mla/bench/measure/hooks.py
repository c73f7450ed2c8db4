"""Callbacks of the engine: when to stop, and signs of life. None is called inside a timed region."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mla.bench.subjects.base import Implementation
from mla.verify.verdict import Check


@dataclass(frozen=True)
class Hooks:
    """By default the engine runs to the end, without a watchdog."""

    should_stop: Callable[[], bool] | None = None  # asked before every timed pass
    enter: Callable[[str], None] = lambda name: None  # the implementation that runs from now on
    heartbeat: Callable[[], None] = lambda: None  # called between forwards
    # An implementation whose pass was wrong, while its inputs, cache and collected outputs are in place.
    failed: Callable[[Implementation, Check], None] = lambda one, check: None
