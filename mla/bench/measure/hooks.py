"""Callbacks of the engine: when to stop, and signs of life. None is called inside a timed region."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mla.bench.measure.target import Target
from mla.bench.measure.variants import Steps
from mla.bench.subjects.base import Implementation
from mla.verify.verdict import Check

# Implementation -> what it runs of the headline, and of nothing else, and the clause that says why.
Shorter = Mapping[str, tuple[Steps, str]]


@dataclass(frozen=True)
class Hooks:
    """By default the engine runs to the end, without a watchdog."""

    # Asked before checks and every timed pass, with their seconds and name: why they do not fit, or "".
    should_stop: Callable[[float, str], str] = lambda seconds, what: ""
    enter: Callable[[str], None] = lambda name: None  # the implementation that runs from now on
    heartbeat: Callable[[], None] = lambda: None  # called between forwards
    # An implementation whose pass was wrong, while its inputs, cache and collected outputs are in place.
    failed: Callable[[Implementation, Check], None] = lambda one, check: None
    # Asked after every warm-up, with the milliseconds of a forward of each implementation that is
    # not wrong, in their order, and how many forwards of the last one fit into the time that is left.
    shorten: Callable[[Mapping[str, float], float], Shorter] = lambda ms, most: {}
    warmups: int = 0  # that the user asked for: they run however long they take
    say: Callable[[str], None] = lambda text: None  # what a reader of the numbers should know
    first: str = ""  # the run's first implementation; by default the first that is measured
    target: Target = Target()  # noqa: RUF009  # without limits, nothing of it changes
