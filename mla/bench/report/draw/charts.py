"""Draw the report's charts. Only the command `report` imports this, and matplotlib with it.

Every function returns an inline SVG. Legends are HTML next to it, so that they never cover a point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from mla.bench.report.draw import chart_axes
from mla.bench.report.draw.svg import inline, styled
from mla.bench.report.series import AXES, Curves, Measure, Quantity, ReportEntry, thin
from mla.bench.report.style import DARK, GREY, Look, Palette, ink
from mla.bench.results.compare import NOISE
from mla.bench.results.schema import Case
from mla.bench.terminal.digits import number
from mla.bench.terminal.stages import total, wholes


@dataclass(frozen=True)
class Relative:
    """A time as a multiple of a reference, and how to draw it."""

    measure: Measure
    colour: str
    marker: str


# Inches. The page scales charts to its columns; at this width text stays readable on a phone.
WIDTH = 5.6


@styled()
def curve(slug: str, title: str, group: Curves, quantity: Quantity, look: Look) -> str:
    """Draw one quantity along an axis of the grid, with whiskers of its interval."""
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for line in group.lines:
        drawn = [(x, m) for x, entry in line.points if (m := quantity.of(entry.case)) is not None]
        axes.errorbar(
            [x for x, _ in drawn],
            [measure.value for _, measure in drawn],
            yerr=chart_axes.whiskers([measure for _, measure in drawn]),
            color=look.colours[line.entry.case.implementation],
            marker=look.shapes.marker(line.shape),
            linestyle=(0, look.shapes.dash(line.shape)) if look.shapes.dash(line.shape) else "-",
            markersize=5,
            linewidth=1.4,
            capsize=2.5,
        )
    chart_axes.places(axes, {x for line in group.lines for x, _ in line.points})
    chart_axes.log(axes, "y")
    axes.set_xlabel(AXES[group.axis])
    axes.set_ylabel(f"{quantity.name}, {quantity.unit}")
    return inline(figure, slug, title)


@styled()
def bars(
    slug: str,
    title: str,
    names: Sequence[str],
    entries: Sequence[ReportEntry],
    quantities: Sequence[Quantity],
    look: Look,
) -> str:
    """Draw quantities of cases as bars with whiskers, one subplot per quantity."""
    figure = Figure(figsize=(WIDTH, 0.75 + chart_axes.height(names, 0.27)), layout="constrained")
    colours = [look.colours[entry.case.implementation] for entry in entries]
    subplots = figure.subplots(1, len(quantities), sharey=True, squeeze=False)[0]
    for subplot, quantity in zip(subplots, quantities, strict=True):
        measures = [quantity.of(entry.case) or Measure(0.0, None, None) for entry in entries]
        subplot.barh(
            range(len(entries)),
            [measure.value for measure in measures],
            height=0.7,
            color=colours,
            xerr=chart_axes.whiskers(measures),
            error_kw={"ecolor": DARK, "capsize": 2.5, "elinewidth": 1},
        )
        chart_axes.rows(subplot, names)
        chart_axes.end_labels(subplot, measures)
        subplot.set_xlabel(f"{quantity.name}, {quantity.unit}")
    return inline(figure, slug, title)


@styled()
def stages(
    slug: str, title: str, names: Sequence[str], entries: Sequence[ReportEntry], colours: Palette
) -> str:
    """Draw the stages of every case end to end, with a mark for the whole forward."""
    figure = Figure(figsize=(WIDTH, 0.75 + chart_axes.height(names, 0.36)), layout="constrained")
    axes = figure.add_subplot()
    totals = [total(entry.case.stages) for entry in entries]
    for row, entry in enumerate(entries):
        start = 0.0
        for stage in wholes(entry.case.stages):
            colour = colours[stage.name]
            axes.barh(row, stage.ms, left=start, height=0.62, color=colour, edgecolor="white", linewidth=0.8)
            if _fits(number(stage.ms), stage.ms / max(totals)):
                middle = start + stage.ms / 2
                axes.text(middle, row, number(stage.ms), color=ink(colour), ha="center", va="center", size=8)
            start += stage.ms
        if entry.case.latency_ms is not None:
            median = entry.case.latency_ms.median
            axes.plot([median] * 2, [row - 0.44, row + 0.44], color=DARK, linewidth=2)
    chart_axes.rows(axes, names)
    axes.set_xlim(left=0)
    axes.set_xlabel("ms, stage after stage")
    axes.grid(True, axis="x")
    return inline(figure, slug, title)


def _fits(text: str, share: float) -> bool:
    """Return whether 8-point text fits into a share of the longest bar, which is about 280 points long."""
    return 280 * share > 5.2 * len(text) + 4


@styled()
def relative(
    slug: str, title: str, names: Sequence[str], dots: Sequence[Sequence[Relative]], label: str
) -> str:
    """Draw, row by row, times as multiples of a reference, with their intervals."""
    pitch = 0.3 if len(names) <= chart_axes.MANY_ROWS else 0.18
    figure = Figure(figsize=(WIDTH, 0.85 + chart_axes.height(names, pitch)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvspan(1 - NOISE, 1 + NOISE, color="#eeeeee", linewidth=0)
    axes.axvline(1, color=GREY, linewidth=1)
    for row, members in enumerate(dots):
        for place, dot in enumerate(members):
            axes.errorbar(
                dot.measure.value,
                row + 0.5 * ((place + 1) / (len(members) + 1) - 0.5),
                xerr=chart_axes.whiskers([dot.measure]),
                color=dot.colour,
                marker=dot.marker,
                markersize=6,
                capsize=2.5,
                linestyle="none",
            )
    chart_axes.rows(axes, names)
    axes.margins(x=0.08)
    chart_axes.log(axes, "x")
    axes.set_xlabel(label)
    return inline(figure, slug, title)


@styled()
def samples(slug: str, title: str, entries: Sequence[ReportEntry], most: int, look: Look) -> str:
    """Draw the samples of every case over their index: a strip per case, thin lines between passes."""
    figure = Figure(figsize=(WIDTH, 0.45 + 0.95 * len(entries)), layout="constrained")
    lengths = {len(entry.case.latency_ms.samples) for entry in entries if entry.case.latency_ms}
    subplots = figure.subplots(len(entries), 1, squeeze=False, sharex=len(lengths) == 1)[:, 0]
    for subplot, entry in zip(subplots, entries, strict=True):
        _strip(subplot, entry, most, look.colours[entry.case.implementation])
        subplot.set_title(_strip_title(entry.case), loc="left", fontsize=8, pad=3)
    subplot.set_xlabel("forward")
    return inline(figure, slug, title)


def _strip_title(case: Case) -> str:
    title = chart_axes.label(case.implementation)
    if case.latency_ms and case.latency_ms.drift is not None:
        title += f"  ·  drift {100 * case.latency_ms.drift:+.1f} %"
    if case.latency_ms and case.latency_ms.outliers:
        title += f"  ·  {case.latency_ms.outliers} outliers"
    return title


def _strip(subplot: Axes, entry: ReportEntry, most: int, colour: str) -> None:
    case = entry.case
    assert case.latency_ms is not None
    values, steps = case.latency_ms.samples, case.steps_per_pass
    if steps > 1 and len(values) <= 60 * steps:
        for start in range(steps, len(values), steps):
            subplot.axvline(start - 0.5, color="#cccccc", linewidth=0.6)
    subplot.axhline(case.latency_ms.median, color=GREY, linewidth=0.8)
    _points(subplot, thin(values, most), colour)
    subplot.set_xlim(-0.5 - 0.01 * len(values), 0.5 + 1.01 * len(values) - 1)
    low, high = min(values), max(values)
    subplot.set_ylim(low - 0.12 * (high - low or low), high + 0.12 * (high - low or high))
    subplot.yaxis.set_major_locator(MaxNLocator(3))
    subplot.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    subplot.set_ylabel("ms", fontsize=8)


def _points(subplot: Axes, points: Sequence[tuple[int, float]], colour: str) -> None:
    """Draw points as zero-length strokes with round caps: a third of the bytes of markers."""
    corners = [point for point in points for _ in range(2)]
    path = Path(corners, [Path.MOVETO, Path.LINETO] * len(points))
    path.should_simplify = False
    stroke = {
        "edgecolor": colour,
        "facecolor": "none",
        "linewidth": 2.4 if len(points) > 60 else 4,
        "capstyle": "round",
    }
    subplot.add_patch(PathPatch(path, **stroke))
