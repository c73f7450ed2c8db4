"""Curves along a grid, times as multiples of a reference, and samples. Returns inline SVGs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from mla.bench.report.draw import chart_axes
from mla.bench.report.draw.labels import Box, Point, around, beside, clear, stretch
from mla.bench.report.draw.room import Room, fix, pixel
from mla.bench.report.draw.rows import Rows, wrapped
from mla.bench.report.draw.style import GREY, MISSING, Look
from mla.bench.report.draw.svg import WIDTH, Caption, inline, styled
from mla.bench.report.draw.theme import paint
from mla.bench.report.series import AXES, Curves, Line, Measure, Quantity, ReportEntry, printable, thin
from mla.bench.results.compare import NOISE
from mla.bench.results.schema import Case
from mla.bench.terminal.digits import known

# Most lines with their names beside them, and most characters of such a name.
MOST_NAMED, LETTERS = 4, 26
# Most limits in one chart of curves: more would hide the curves.
MOST_LIMITS = 2


@dataclass(frozen=True)
class Relative:
    """A time as a multiple of a reference, and how to draw it."""

    measure: Measure
    colour: str
    marker: str
    named: bool = True  # its value stands beside it


@styled()
def curve(caption: Caption, group: Curves, quantity: Quantity, look: Look) -> tuple[str, bool]:
    """Draw one quantity along an axis of the grid; also return whether every line has its name beside it.

    It has if all names are short and find room; else a legend is needed.
    """
    names = [printable(group.label(line)) for line in group.lines]
    named = len(names) <= MOST_NAMED and max(map(len, names)) <= LETTERS
    figure, left_out = _curve(group, quantity, look, names if named else [])
    if named and left_out:
        named = False
        figure, _ = _curve(group, quantity, look, [])
    return inline(figure, caption), named


def _curve(group: Curves, quantity: Quantity, look: Look, names: Sequence[str]) -> tuple[Figure, int]:
    """Return the chart and how many of the names of its lines found no room."""
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained", dpi=72)  # a pixel is a point
    axes = figure.add_subplot()
    drawn = [_line(axes, line, quantity, look) for line in group.lines]
    limits = _limits(axes, group, quantity)
    labels = [*names, *[""] * (len(drawn) - len(names)), *limits.values()]
    chart_axes.places(axes, {x for line in group.lines for x, _ in line.points + line.absent})
    chart_axes.log(axes, "y")
    _withheld(axes, group)
    axes.set_xlabel(AXES[group.axis])
    axes.set_ylabel(f"{quantity.name}, {quantity.unit}")
    fix(figure)
    ends = [[pixel(axes, *point) for point in points] for points in [*drawn, *map(list, limits)]]
    missing = _nameless(axes, labels, ends)
    return figure, sum(name in missing for name in names)


def _nameless(axes: Axes, labels: Sequence[str], ends: Sequence[Sequence[Point]]) -> list[str]:
    """Write the names of lines, each nearer to its own than to any other; return those without room."""
    lines = [list(_covered(points)) for points in ends]
    room = Room(axes, [around(point, 4) for points in ends for point in points], [*chain(*lines)])
    missing = []
    for place, (label, points) in enumerate(zip(labels, ends, strict=True)):
        if points and label:
            others = [box for line in lines[:place] + lines[place + 1 :] for box in line]
            if room.put((label, partial(_near, points, lines[place], others))) is None:
                missing.append(label)
    return missing


def _near(points: Sequence[Point], own: Sequence[Box], others: Sequence[Box], size: Point) -> Iterator[Box]:
    """Yield places for the name of a line: near its last point, then near the ones before."""
    places = chain.from_iterable(beside(point, size, rings=2) for point in reversed(points))
    return clear(places, own, others)


def _covered(points: Sequence[Point]) -> Iterator[Box]:
    yield from (around(point, 1) for point in points)
    for start, end in pairwise(points):
        yield from stretch(start, end)


def _line(axes: Axes, line: Line, quantity: Quantity, look: Look) -> list[Point]:
    """Draw a line with whiskers; return its points. What is in doubt is hollow."""
    found = [(x, entry.case, m) for x, entry in line.points if (m := quantity.of(entry.case)) is not None]
    colour = paint(look.colours[line.entry.case.implementation])
    dash = look.dashes.dash(line.entry.case.implementation)
    xs, measures = [x for x, _, _ in found], [measure for _, _, measure in found]
    style: dict[str, Any] = {"color": colour, "marker": look.shapes.marker(line.shape), "markersize": 5}
    axes.errorbar(
        xs,
        [measure.value for measure in measures],
        yerr=chart_axes.whiskers(measures),
        linestyle=(0, dash) if dash else "-",
        linewidth=1.4,
        capsize=2.5,
        **style,
    )
    doubts = [(x, m.value) for x, case, m in found if case.roofline.doubt]
    for x, value in doubts:
        axes.plot(x, value, **{**style, "markersize": 7}, markerfacecolor=paint("paper"), zorder=4)
    return [(x, measure.value) for x, _, measure in found]


def _limits(axes: Axes, group: Curves, quantity: Quantity) -> dict[tuple[Point, ...], str]:
    """Draw the limits of the lines if they are few; return their points and names, with letters of files."""
    found: dict[tuple[Point, ...], list[str]] = {}
    for line in group.lines:
        points = tuple((x, limit) for x, entry in line.points if (limit := quantity.limit(entry.case)))
        if len(points) > 1:
            found.setdefault(points, []).append(line.entry.file.key)
    if len(found) > MOST_LIMITS:
        return {}
    for points in found:
        axes.plot(*zip(*points, strict=True), color=paint("ink"), linewidth=1, linestyle=(0, (1, 2)))
    several = len({key for keys in found.values() for key in keys}) > 1
    return {
        points: f"{', '.join(dict.fromkeys(keys))} limit" if several else "limit"
        for points, keys in found.items()
    }


def _withheld(axes: Axes, group: Curves) -> None:
    """Mark the places of cases without a number, above the axis."""
    for x, entry in (one for line in group.lines for one in line.absent):
        sign, colour = MISSING.get(entry.case.check.status, MISSING["not run"])
        axes.text(
            x, 0.02, sign, color=paint(colour), transform=axes.get_xaxis_transform(), ha="center", size=11
        )


@styled()
def relative(
    caption: Caption,
    names: Sequence[str],
    dots: Sequence[Sequence[Relative]],
    label: str,
    every: Sequence[Sequence[Relative]],
) -> str:
    """Draw, row by row, times as multiples of a reference, with their intervals.

    `every` is what is drawn in all parts of the panel: all have one scale.
    """
    most = max(map(len, dots))
    rows = Rows(names, bar=0.14 * max(1, most) + 0.04)
    figure = Figure(figsize=(WIDTH, 0.6 + rows.height), layout="constrained")
    axes = figure.add_subplot()
    rows.set(axes)
    axes.axvspan(1 - NOISE, 1 + NOISE, color=paint("band"), linewidth=0)
    axes.axvline(1, color=paint(GREY), linewidth=1)
    for middle, members in zip(rows.middles, dots, strict=True):
        for place, dot in enumerate(members):
            _dot(axes, middle + 0.14 * (place - (len(members) - 1) / 2), dot)
    axes.set_xlim(*_reach(every))
    chart_axes.log(axes, "x")
    axes.set_xlabel(label)
    return inline(figure, caption)


def _reach(dots: Sequence[Sequence[Relative]]) -> tuple[float, float]:
    """Return the range of a logarithmic scale that holds all intervals, with room for values, and 1."""
    ends = [end for row in dots for one in row for end in one.measure if end]
    low, high = min(1 - NOISE, *ends), max(1 + NOISE, *ends)
    room = (high / low) ** 0.22
    return low / room**0.5, high * room


def _dot(axes: Axes, row: float, dot: Relative) -> None:
    """Draw a multiple with its interval and its value."""
    axes.errorbar(
        dot.measure.value,
        row,
        xerr=chart_axes.whiskers([dot.measure]),
        color=paint(dot.colour),
        marker=dot.marker,
        markersize=6,
        capsize=2.5,
        linestyle="none",
    )
    if not dot.named:
        return
    axes.annotate(
        f"{dot.measure.value:.3g}x",
        (dot.measure.high or dot.measure.value, row),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
    )


@styled()
def samples(caption: Caption, entries: Sequence[ReportEntry], most: int, look: Look) -> str:
    """Draw the samples of every case over their index: a strip per case, thin lines between passes."""
    titles = [_strip_title(entry.case) for entry in entries]
    height = sum(0.9 + 0.15 * title.count("\n") for title in titles)
    figure = Figure(figsize=(WIDTH, 0.45 + height), layout="constrained")
    lengths = {len(entry.case.latency_ms.samples) for entry in entries if entry.case.latency_ms}
    subplots = figure.subplots(len(entries), 1, squeeze=False, sharex=len(lengths) == 1)[:, 0]
    for subplot, entry, title in zip(subplots, entries, titles, strict=True):
        _strip(subplot, entry, most, paint(look.colours[entry.case.implementation]))
        subplot.set_title(title, loc="left", pad=3)
    subplot.set_xlabel("forward, in the order they ran")
    return inline(figure, caption)


def _strip_title(case: Case) -> str:
    latency = case.latency_ms
    assert latency is not None
    parts = [f"median {known(latency.median, latency.ci95)} ms"]
    parts += [] if latency.drift is None else [f"drift {100 * latency.drift:+.1f} %"]
    if latency.outliers:
        parts.append(f"{latency.outliers} outlier{'s' if latency.outliers > 1 else ''}")
    return f"{wrapped(case.implementation)}\n{'  ·  '.join(parts)}"


def _strip(subplot: Axes, entry: ReportEntry, most: int, colour: str) -> None:
    case = entry.case
    assert case.latency_ms is not None
    values, steps = case.latency_ms.samples, case.steps_per_pass
    if steps > 1 and len(values) <= 60 * steps:
        for start in range(steps, len(values), steps):
            subplot.axvline(start - 0.5, color=paint("rule"), linewidth=0.6)
    subplot.axhline(case.latency_ms.median, color=paint(GREY), linewidth=0.8)
    _points(subplot, thin(values, most), colour)
    subplot.set_xlim(-0.5 - 0.01 * len(values), 0.5 + 1.01 * len(values) - 1)
    low, high = min(values), max(values)
    subplot.set_ylim(low - 0.12 * (high - low or low), high + 0.12 * (high - low or high))
    subplot.yaxis.set_major_locator(MaxNLocator(3))
    subplot.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    subplot.set_ylabel("ms")


def _points(subplot: Axes, points: Sequence[tuple[int, float]], colour: str) -> None:
    """Draw points as zero-length strokes with round caps: a third of the bytes of markers."""
    corners = [point for point in points for _ in range(2)]
    path = Path(corners, [Path.MOVETO, Path.LINETO] * len(points))
    path.should_simplify = False
    stroke = {
        "edgecolor": colour,
        "facecolor": "none",
        "linewidth": 2.2 if len(points) > 60 else 3.6,
        "capstyle": "round",
    }
    subplot.add_patch(PathPatch(path, **stroke))
