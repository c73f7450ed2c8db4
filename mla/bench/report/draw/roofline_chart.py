"""Draw the roofline of one file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mla.bench.report.draw import chart_axes
from mla.bench.report.draw.labels import Point, along, around, beside, stretch
from mla.bench.report.draw.room import Room, fix, pixel
from mla.bench.report.draw.svg import WIDTH, Caption, inline, styled
from mla.bench.report.draw.theme import paint
from mla.bench.report.roofline_data import Dot, Roof, RooflineData, ridge
from mla.bench.report.series import printable
from mla.bench.report.style import Look
from mla.bench.terminal.digits import number

# With more cases than this, none is named beside its mark; with more than that, none is labelled.
MOST_NAMED, MOST_LABELS = 8, 12
# How many lines a label may lie away from its mark, with and without a name.
NEAR, FAR = 3, 12
# Most characters of a label.
LETTERS = 34
TERA = 1e12


@styled()
def roofline(caption: Caption, data: RooflineData, look: Look) -> tuple[str, int, bool]:
    """Draw every case of a file under its known roofs.

    Also return how many labels found no room, and whether every case has its name beside it. It has if all
    names find room; else labels are shares of limits alone, and a legend is needed.
    """
    named = len(data.dots) <= MOST_NAMED
    figure, left_out = draw(data, look, named=named)
    if named and left_out:
        named = False
        figure, left_out = draw(data, look)
    return inline(figure, caption), left_out, named


def draw(data: RooflineData, look: Look, *, named: bool = False) -> tuple[Figure, int]:
    """Return the chart and how many of its labels found no room."""
    figure = Figure(figsize=(WIDTH, 4.0), layout="constrained", dpi=72)  # a pixel is a point
    axes = figure.add_subplot()
    axes.set_xlim(*_span(data))
    rates = [dot.rate for dot in data.dots] + [r.value for r in data.roofs if r.bound == "compute"]
    axes.set_ylim(min(rates) / TERA / 3, max(rates) / TERA * 3)
    chart_axes.log(axes, "x")
    chart_axes.log(axes, "y")
    axes.set_xlabel("arithmetic intensity, FLOP per byte")
    axes.set_ylabel("throughput, TFLOP/s")
    for dot in data.dots:
        axes.plot(
            dot.intensity,
            dot.rate / TERA,
            linestyle="none",
            marker=look.shapes.marker(dot.entry.case.base),
            color=paint(look.colours[dot.entry.case.implementation]),
            markersize=7,
            markerfacecolor="none",  # overlapping dots stay visible
            markeredgewidth=1.8,
        )
    fix(figure)
    return figure, _write_labels(axes, data, look, named)


def _span(data: RooflineData) -> tuple[float, float]:
    """Return the range of intensities to show: every case, and the ridge point."""
    shown = [dot.intensity for dot in data.dots]
    ridge_point = ridge(data.roofs)
    shown += [ridge_point] if ridge_point else []
    return min(shown) / 4, max(shown) * 4


def _write_labels(axes: Axes, data: RooflineData, look: Look, named: bool) -> int:
    """Draw the roofs and label everything; return how many labels found no room."""
    points = [pixel(axes, dot.intensity, dot.rate / TERA) for dot in data.dots]
    ends = [_draw_roof(axes, roof, data.roofs) for roof in data.roofs]
    lines = [box for start, end in ends for box in stretch(start, end)]
    room = Room(axes, [around(point, 5) for point in points], lines)
    for roof, (start, end) in zip(data.roofs, ends, strict=True):
        room.put(_roof_label(roof), partial(along, start, end, above=roof.bound == "compute"))
    if len(data.dots) <= MOST_LABELS:
        for dot, point in sorted(zip(data.dots, points, strict=True), key=lambda pair: -pair[0].rate):
            case = dot.entry.case
            name = printable(f"{case.scenario}, {case.implementation}", LETTERS) if named else ""
            _label_dot(room, dot, point, look.colours[case.implementation], name)
    return room.left_out


def _draw_roof(axes: Axes, roof: Roof, roofs: Sequence[Roof]) -> tuple[Point, Point]:
    """Draw a roof as far as the highest one of the other kind; return its ends in pixels."""
    flat = [one.value for one in roofs if one.bound == "compute"]
    steep = [one.value for one in roofs if one.bound == "memory"]
    low, high = axes.get_xlim()
    value = roof.value / TERA
    if roof.bound == "compute":
        start, height = (max(low, roof.value / max(steep)) if steep else low), (value, value)
        ends = (start, high)
    else:
        ends = (max(low, axes.get_ylim()[0] / value), min(high, max(flat) / roof.value) if flat else high)
        height = (ends[0] * value, ends[1] * value)
    axes.plot(ends, height, color=paint("ink"), linewidth=1.2)
    return pixel(axes, ends[0], height[0]), pixel(axes, ends[1], height[1])


def _roof_label(roof: Roof) -> str:
    """Return a roof's value and what distinguishes it from the others of its kind."""
    value = f"{number(roof.value / TERA)} TFLOP/s" if roof.bound == "compute" else _rate(roof)
    detail = f" ({printable(roof.detail, LETTERS - 20)})" if roof.detail else ""
    return f"limit {value}{detail}"


def _rate(roof: Roof) -> str:
    return f"{number(roof.value / 1e9)} GB/s"


def _label_dot(room: Room, dot: Dot, point: Point, colour: str, name: str) -> None:
    """Write a case's name and share of its limit beside it, with a line to it if it is not next to it."""
    limit = dot.entry.case.roofline
    share = "in doubt" if limit.doubt else "" if limit.fraction is None else f"{100 * limit.fraction:.0f} %"
    text = " ".join(filter(None, (name, share)))
    places = partial(beside, point, rings=NEAR if name else FAR)
    room.tie(room.put(text, places) if text else None, point, colour)
