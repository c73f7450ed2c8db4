"""The sections of the report: their order, and what each says before its pictures."""

from __future__ import annotations

from dataclasses import dataclass

from mla.bench.report.case_panels import against_grid, breakdown, rooflines, scenarios
from mla.bench.report.panel import Context, Picture
from mla.bench.report.timing_panels import (
    MOST_STRIPS,
    against_base,
    distributions,
    further_timings,
)
from mla.bench.results.compare import NOISE

#: What stands before the pictures of a section.
_GRID = "Medians along the axes of the grid, with 95 % intervals as whiskers. Both axes are logarithmic."
_SCENARIOS = (
    "Medians with 95 % intervals as whiskers. Cases without a number are in the table of results only."
)
_ROOFLINE = (
    "Needed FLOPs per needed byte against needed FLOPs per second, both axes logarithmic. Lines are the "
    "limits; the label of a case is the share of its limit that it reaches. Under the slope memory is the "
    "limit, under the flat roof it is products."
)
_STAGES = (
    "Parts of one forward, each timed alone between synchronizations, so that they add up to more than the "
    "forward itself, which is the dark mark."
)
_TIMINGS = (
    "The same cases timed in other ways, named by mode, state of the cache and clock, as multiples of the "
    "headline (the case's median above: eager, cache warm, with its own clock). Times of different clocks "
    "say where time goes, not which is faster."
)
_COMPARISON = (
    "Every file against the first, case by case: ratio of times with an interval of at least 90 % "
    f"confidence. FASTER and SLOWER need the whole interval beyond the grey band of {100 * NOISE:g} %."
)
_SAMPLES = (
    "Every timed forward in the order it ran; the grey line is the median, thin vertical lines part passes. "
    f"Of a file with more than {MOST_STRIPS} cases, those with the widest spread are drawn."
)


@dataclass(frozen=True)
class Section:
    """A heading, what its pictures show, and the pictures."""

    slug: str
    title: str
    intro: str
    pictures: list[Picture]


def sections(context: Context) -> list[Section]:
    """Return the sections that have something to show, in the order of the report."""
    found = [
        Section("grid", "Against history and batch", _GRID, against_grid(context)),
        Section("scenarios", "Scenarios", _SCENARIOS, scenarios(context)),
        Section("roofline", "Roofline", _ROOFLINE, rooflines(context)),
        Section("stages", "Stages", _STAGES, breakdown(context)),
        Section("timings", "Further timings", _TIMINGS, further_timings(context)),
        Section("comparison", "Comparison", _COMPARISON, against_base(context)),
        Section("samples", "Samples", _SAMPLES, distributions(context)),
    ]
    return [one for one in found if one.pictures]
