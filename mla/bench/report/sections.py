"""The sections of the report: their order and introductions."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from mla.bench.report import rank_panels
from mla.bench.report.case_panels import against_grid, breakdown, new_lengths, rooflines, scenarios
from mla.bench.report.panel import Context, Panel
from mla.bench.report.timing_panels import (
    MOST_STRIPS,
    against_base,
    distributions,
    further_timings,
)
from mla.bench.results.compare import NOISE

_GRID = "Medians along the axes of the grid, with 95 % intervals as whiskers. Both axes are logarithmic."
_SCENARIOS = (
    "Medians with 95 % intervals as whiskers. A bar that would flatten all others is broken off (»); a "
    "whisker that would ends in an arrow."
)
_ROOFLINE = (
    "Necessary FLOPs per second over necessary FLOPs per byte, both axes logarithmic. Lines are the limits; "
    "the label of a case is the share of its limit that it reaches. Cases under the slope are limited by "
    "memory, those under the flat roof by compute."
)
_STAGES = (
    "Parts of one forward, each timed alone between synchronizations, so they add up to more than the "
    "forward itself, shown as the dark mark."
)
_TIMINGS = (
    "The same cases timed in other ways, named by mode, cache state and clock, as multiples of the headline "
    "(the case's median above: eager, warm cache, its own clock). Times from different clocks show where "
    "time goes, not which is faster."
)
_LENGTHS = (
    "Forwards on lengths that nothing had seen before, planning included, next to forwards whose lengths "
    "repeat. A server sees new lengths all the time; a schedule kept per tuple of lengths shows as a gap."
)
_COMPARISON = (
    "Every file compared with the first, case by case: the ratio of times with an interval of at least 90 % "
    f"confidence. FASTER and SLOWER require the whole interval outside the grey band of {100 * NOISE:g} %."
)
_SAMPLES = (
    "Every timed forward in the order it ran; the grey line is the median, thin vertical lines separate "
    f"passes. For a file with more than {MOST_STRIPS} cases, those with the widest spread are drawn."
)


@dataclass(frozen=True)
class Section:
    """A heading, an introduction and the panels."""

    slug: str
    title: str
    intro: str
    panels: list[Panel]


# Every section of the report in its order, and what draws its panels.
_EVERY: tuple[tuple[str, str, str, Callable[[Context], list[Panel]]], ...] = (
    ("grid", "Against history and batch", _GRID, against_grid),
    ("scenarios", "Scenarios", _SCENARIOS, scenarios),
    ("roofline", "Roofline", _ROOFLINE, rooflines),
    ("ranks", "Ranks", rank_panels.RANKS, rank_panels.ranks),
    ("scaling", "Strong scaling", rank_panels.SCALING, rank_panels.scaling),
    ("stages", "Stages", _STAGES, breakdown),
    ("timings", "Further timings", _TIMINGS, further_timings),
    ("lengths", "New lengths", _LENGTHS, new_lengths),
    ("comparison", "Comparison", _COMPARISON, against_base),
    ("samples", "Samples", _SAMPLES, distributions),
)


def sections(context: Context, only: Collection[str] = ()) -> list[Section]:
    """Return the sections that have panels, in the order of the report; if given, `only` those slugs."""
    drawn = [
        Section(slug, title, intro, draw(context))
        for slug, title, intro, draw in _EVERY
        if not only or slug in only
    ]
    return [section for section in drawn if section.panels]
