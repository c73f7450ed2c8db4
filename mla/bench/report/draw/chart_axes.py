"""Chart axes: plain numbers on logarithmic scales, rows of names, whiskers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, Locator, LogLocator, MaxNLocator, NullLocator

from mla.bench.report.series import Measure, printable
from mla.bench.report.style import DARK
from mla.bench.terminal.digits import number

# Most characters in a line of a name in a chart; tables show it whole.
LABEL = 42
# Most lines of such a name.
LINES = 3
# Most ticks on the axis of a grid: more would overlap.
MOST_TICKS = 9
# With more rows than this, their names are set smaller.
MANY_ROWS = 16
# A bar this many times as long as the next shorter one is broken off: the others could not be told apart.
FLATTENS = 8.0

Side = Literal["x", "y"]


def label(name: str) -> str:
    """Return a name for a chart: one with a list of ops is wrapped behind a comma, then cut to `LINES`."""
    lines = [""]
    for part in re.split(r"(?<=,)", printable(name)):
        if lines[-1] and len(lines[-1] + part) > LABEL and len(lines) < LINES:
            lines.append("")
        lines[-1] += part
    return "\n".join(printable(line, LABEL) for line in lines)


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
        return MaxNLocator(6, steps=[1, 2, 5, 10])
    return LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,), numticks=20)


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


def height(names: Sequence[str], pitch: float) -> float:
    """Return the inches that all rows take: `pitch` each, or more for names of several lines."""
    lines = max(label(name).count("\n") + 1 for name in names)
    return len(names) * (pitch if lines == 1 else max(pitch, 0.16 * lines))


def rows(axes: Axes, names: Sequence[str]) -> None:
    """Label the rows of a chart from the top."""
    axes.set_yticks(range(len(names)), [label(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelsize=8 if len(names) > MANY_ROWS else 9)
    axes.spines["left"].set_visible(False)


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


def end_labels(axes: Axes, measures: Sequence[Measure]) -> None:
    """Write each value to the right of its bar and whisker; a bar beyond the scale ends at a broken edge."""
    ends = [one.value if one.high is None else max(one.high, one.value) for one in measures]
    whole = 1.12 * scale_end(ends)
    axes.set_xlim(0, 1.36 / 1.12 * whole)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    axes.grid(True, axis="x")
    for row, (end, one) in enumerate(zip(ends, measures, strict=True)):
        broken = end > whole
        text = f"» {number(one.value)}" if broken else number(one.value)
        if broken:
            _broken_edge(axes, whole, row)
        axes.annotate(
            text,
            (min(end, whole), row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )


def _broken_edge(axes: Axes, place: float, row: int) -> None:
    """Cover what lies beyond the scale, so that the bar visibly goes on."""
    axes.barh(row, axes.get_xlim()[1] - place, left=place, height=0.9, color="white", zorder=3)
    axes.plot(
        [place] * 2, [row - 0.45, row + 0.45], color=DARK, linestyle=(0, (2, 1.5)), linewidth=1, zorder=4
    )
