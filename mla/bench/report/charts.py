"""Draw each picture of the report. Only the report command imports this, and matplotlib with it.

Every function returns an inline SVG. Legends are HTML beside it, so that no legend ever covers a point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from mla.bench.report import chart_axes as axis
from mla.bench.report.series import AXES, Curves, Entry, Measure, Quantity, printable, thin
from mla.bench.report.style import DARK, GREY, Look, Palette, ink
from mla.bench.report.svg import inline, styled
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


#: Inches. The page scales pictures to its columns; this wide, text stays readable on a phone.
WIDTH = 5.6


@styled()
def curve(slug: str, title: str, found: Curves, quantity: Quantity, look: Look) -> str:
    """Draw one quantity along an axis of the grid, with whiskers of its interval."""
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for line in found.lines:
        drawn = [(x, m) for x, entry in line.points if (m := quantity.of(entry.case)) is not None]
        axes.errorbar(
            [x for x, _ in drawn],
            [measure.value for _, measure in drawn],
            yerr=axis.whiskers([measure for _, measure in drawn]),
            color=look.colours[line.entry.colour_key],
            marker=look.shapes.marker(line.others),
            linestyle=(0, look.shapes.dash(line.others)) if look.shapes.dash(line.others) else "-",
            markersize=5,
            linewidth=1.4,
            capsize=2.5,
        )
    axis.places(axes, {x for line in found.lines for x, _ in line.points})
    axis.log(axes, "y")
    axes.set_xlabel(AXES[found.axis])
    axes.set_ylabel(f"{quantity.name}, {quantity.unit}")
    return inline(figure, slug, title)


@styled()
def bars(
    slug: str,
    title: str,
    names: Sequence[str],
    found: Sequence[Entry],
    quantities: Sequence[Quantity],
    look: Look,
) -> str:
    """Draw quantities of cases side by side as bars with whiskers."""
    figure = Figure(figsize=(WIDTH, 0.75 + 0.27 * len(found)), layout="constrained")
    colours = [look.colours[entry.colour_key] for entry in found]
    panels = figure.subplots(1, len(quantities), sharey=True, squeeze=False)[0]
    for panel, quantity in zip(panels, quantities, strict=True):
        measures = [quantity.of(entry.case) or Measure(0.0, None, None) for entry in found]
        panel.barh(
            range(len(found)),
            [one.value for one in measures],
            height=0.7,
            color=colours,
            xerr=axis.whiskers(measures),
            error_kw={"ecolor": DARK, "capsize": 2.5, "elinewidth": 1},
        )
        axis.rows(panel, names)
        axis.end_labels(panel, measures)
        panel.set_xlabel(f"{quantity.name}, {quantity.unit}")
    return inline(figure, slug, title)


@styled()
def stages(slug: str, title: str, names: Sequence[str], found: Sequence[Entry], colours: Palette) -> str:
    """Draw the stages of every case end to end, and the whole forward as a mark over them."""
    figure = Figure(figsize=(WIDTH, 0.75 + 0.36 * len(found)), layout="constrained")
    axes = figure.add_subplot()
    totals = [total(entry.case.stages) for entry in found]
    for row, entry in enumerate(found):
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
    axis.rows(axes, names)
    axes.set_xlim(left=0)
    axes.set_xlabel("ms, stage after stage")
    axes.grid(True, axis="x")
    return inline(figure, slug, title)


def _fits(text: str, share: float) -> bool:
    """Say whether a text of 8 points fits into a share of the longest bar, which is about 280 points."""
    return 280 * share > 5.2 * len(text) + 4


@styled()
def relative(
    slug: str, title: str, names: Sequence[str], dots: Sequence[Sequence[Relative]], label: str
) -> str:
    """Draw, row by row, times as multiples of a reference with their intervals."""
    pitch = 0.3 if len(names) <= axis.MANY_ROWS else 0.18
    figure = Figure(figsize=(WIDTH, 0.85 + pitch * len(names)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvspan(1 - NOISE, 1 + NOISE, color="#eeeeee", linewidth=0)
    axes.axvline(1, color=GREY, linewidth=1)
    for row, members in enumerate(dots):
        for place, dot in enumerate(members):
            axes.errorbar(
                dot.measure.value,
                row + 0.5 * ((place + 1) / (len(members) + 1) - 0.5),
                xerr=axis.whiskers([dot.measure]),
                color=dot.colour,
                marker=dot.marker,
                markersize=6,
                capsize=2.5,
                linestyle="none",
            )
    axis.rows(axes, names)
    axes.margins(x=0.08)
    axis.log(axes, "x")
    axes.set_xlabel(label)
    return inline(figure, slug, title)


@styled()
def samples(slug: str, title: str, found: Sequence[Entry], most: int, look: Look) -> str:
    """Draw the samples of every case over their index, a strip per case, passes parted by thin lines."""
    figure = Figure(figsize=(WIDTH, 0.45 + 0.95 * len(found)), layout="constrained")
    lengths = {len(entry.case.latency_ms.samples) for entry in found if entry.case.latency_ms}
    panels = figure.subplots(len(found), 1, squeeze=False, sharex=len(lengths) == 1)[:, 0]
    for panel, entry in zip(panels, found, strict=True):
        _strip(panel, entry, most, look.colours[entry.colour_key])
        panel.set_title(_strip_title(entry.case), loc="left", fontsize=8, pad=3)
    panel.set_xlabel("forward")
    return inline(figure, slug, title)


def _strip_title(case: Case) -> str:
    title = printable(case.implementation, axis.LABEL)
    if case.latency_ms and case.latency_ms.drift is not None:
        title += f"  ·  drift {100 * case.latency_ms.drift:+.1f} %"
    if case.latency_ms and case.latency_ms.outliers:
        title += f"  ·  {case.latency_ms.outliers} far from the others"
    return title


def _strip(panel: Axes, entry: Entry, most: int, colour: str) -> None:
    case = entry.case
    assert case.latency_ms is not None
    values, steps = case.latency_ms.samples, case.steps_per_pass
    if steps > 1 and len(values) <= 60 * steps:
        for start in range(steps, len(values), steps):
            panel.axvline(start - 0.5, color="#cccccc", linewidth=0.6)
    panel.axhline(case.latency_ms.median, color=GREY, linewidth=0.8)
    _points(panel, thin(values, most), colour)
    panel.set_xlim(-0.5 - 0.01 * len(values), 0.5 + 1.01 * len(values) - 1)
    low, high = min(values), max(values)
    panel.set_ylim(low - 0.12 * (high - low or low), high + 0.12 * (high - low or high))
    panel.yaxis.set_major_locator(MaxNLocator(3))
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    panel.set_ylabel("ms", fontsize=8)


def _points(panel: Axes, found: Sequence[tuple[int, float]], colour: str) -> None:
    """Draw points as strokes of no length with round ends: a third of the bytes of one marker each."""
    corners = [point for point in found for _ in range(2)]
    path = Path(corners, [Path.MOVETO, Path.LINETO] * len(found))
    path.should_simplify = False
    stroke = {
        "edgecolor": colour,
        "facecolor": "none",
        "linewidth": 2.4 if len(found) > 60 else 4,
        "capstyle": "round",
    }
    panel.add_patch(PathPatch(path, **stroke))
