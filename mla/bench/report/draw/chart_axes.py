"""Chart axes: plain numbers on logarithmic scales, bars that end in their values, whiskers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, Locator, LogLocator, MaxNLocator, NullLocator

from mla.bench.report.draw.theme import paint
from mla.bench.report.series import Measure
from mla.bench.terminal.digits import number

# Most ticks on the axis of a grid: more would overlap.
MOST_TICKS = 7
# A bar this many times as long as the next shorter one is broken off: the others could not be told apart.
FLATTENS = 8.0

Side = Literal["x", "y"]


def log(axes: Axes, side: Side) -> None:
    """Make an axis logarithmic, with ticks that suit its range."""
    axes.set_xscale("log") if side == "x" else axes.set_yscale("log")
    axis = axes.xaxis if side == "x" else axes.yaxis
    axis.set_major_locator(_locator(*axis.get_view_interval()))
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    axis.set_minor_locator(NullLocator())
    axes.grid(True, axis=side)


def _locator(low: float, high: float) -> Locator:
    """Return round ticks below a decade, 1-2-5 ticks for a few decades, powers of ten for many."""
    decades = math.log10(high / low)
    if decades < 0.8:
        return MaxNLocator(5, steps=[1, 2, 5, 10])
    return LogLocator(subs=(1, 2, 5) if decades < 2 else (1,), numticks=9)


def plain(value: float) -> str:
    """Return a number without an exponent, such as 0.05, 800, 20k or 1.5M."""
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * unit or (unit > 1e3 and abs(value) >= unit):
            return f"{value / unit:.4g}{suffix}"
    return f"{value:.4g}"


def places(axes: Axes, values: Iterable[float]) -> None:
    """Put ticks on the x axis at the grid's values, on a scale where powers of two are evenly spaced."""
    ticks = sorted(set(values))
    if ticks[0] > 0:
        axes.set_xscale("log", base=2)
    else:  # a history of 0 has no logarithm
        axes.set_xscale("symlog", base=2, linthresh=max(1.0, min((x for x in ticks if x > 0), default=1.0)))
    step = math.ceil(len(ticks) / MOST_TICKS)
    axes.xaxis.set_major_locator(FixedLocator(ticks[::-step][::-1]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(True, axis="x")


def count(value: float) -> str:
    """Return a count of tokens or requests; whole multiples of 1024 as "4k"."""
    if value >= 1024 and value % 1024 == 0:
        return f"{value / 1024:.0f}k"
    return f"{value:g}"


def whiskers(measures: Sequence[Measure]) -> list[list[float]]:
    """Return the distances to the lower and upper ends of the intervals; 0 without an interval."""
    down = [0.0 if one.low is None else max(0.0, one.value - one.low) for one in measures]
    up = [0.0 if one.high is None else max(0.0, one.high - one.value) for one in measures]
    return [down, up]


def scale_end(ends: Sequence[float]) -> float:
    """Return where a scale of bars ends: before a few that are so long that most others would vanish."""
    ordered = sorted(end for end in ends if end > 0)
    for place, (shorter, longer) in enumerate(pairwise(ordered), start=1):
        if longer > FLATTENS * shorter and place >= max(2, len(ordered) / 2):
            return shorter
    return ordered[-1] if ordered else 1.0


# The part of the axis beyond the longest bar, for its value.
_BEYOND = 1.3
# A whisker that ends beyond this many times the longest bar is broken off: it would flatten the bars.
_LONG = 1.6


def bar_scale(axes: Axes, measures: Sequence[Measure], limits: Sequence[float], *, break_off: bool) -> float:
    """Choose the scale of bars, with room for their values, limits on it; return where bars must end."""
    values = [one.value for one in measures]
    longest = max([scale_end(values) if break_off else max(values), *limits])
    whole = max([longest, *(end for end in map(_end, measures) if end <= _LONG * longest)])
    axes.set_xlim(0, _BEYOND * whole)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    return 1.05 * whole


def _end(measure: Measure) -> float:
    return measure.value if measure.high is None else max(measure.high, measure.value)


def is_broken(measure: Measure, whole: float) -> bool:
    """Return whether a bar goes on beyond the scale."""
    return measure.value > whole


def within(measure: Measure, whole: float) -> Measure:
    """Return what is drawn of a measure: a bar beyond the scale has no whisker, a long whisker ends there."""
    if is_broken(measure, whole):
        return Measure(whole, None, None)
    return measure._replace(high=None if measure.high is None else min(measure.high, whole))


def end_label(axes: Axes, row: float, height: float, measure: Measure, whole: float, mark: str = "") -> None:
    """Write a value to the right of its bar and whisker.

    A bar beyond the scale ends at a broken edge, a whisker in an arrow, and the label says how far it goes.
    """
    broken, reach = is_broken(measure, whole), 0.65 * height
    end, far = min(_end(measure), whole), ""
    if broken:
        style: dict[str, Any] = {"color": paint("ink"), "linestyle": (0, (2, 1.5)), "linewidth": 1}
        axes.plot([end] * 2, [row - reach, row + reach], **style)
    elif _end(measure) > whole:
        axes.plot(end, row, color=paint("ink"), marker=">", markersize=4)
        far = f" (to {number(measure.high)})"
    axes.annotate(
        f"{'» ' if broken else ''}{measure}{mark}{far}",
        (end, row),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
    )
