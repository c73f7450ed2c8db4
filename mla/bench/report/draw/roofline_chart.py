"""Draw the roofline of one file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mla.bench.report.draw import chart_axes
from mla.bench.report.draw.labels import Box, Point, along, around, below, beside, clear, gap, stretch
from mla.bench.report.draw.room import Room, fix, pixel
from mla.bench.report.draw.style import Look
from mla.bench.report.draw.svg import WIDTH, Caption, inline, styled
from mla.bench.report.draw.theme import paint
from mla.bench.report.roofline_data import Dot, Roof, RooflineData, ridge
from mla.bench.report.series import printable
from mla.bench.terminal.digits import number

# With more cases than this, none is named beside its mark; with more than that, none is labelled.
MOST_NAMED, MOST_LABELS = 8, 12
# How many lines a label may lie away from its mark, with and without a name; across a line if only so many.
NEAR, FAR, NEXT = 3, 12, 2
# Marks that are nearer to each other, in points, are one to the eye.
SAME = 1.0
# Most characters of a label, and of what a limit is of.
LETTERS, DETAIL = 34, 18
# How far the name of a slope may be from it, in points, if another line is beside it.
AWAY = (14, 24, 36, 48, 64)
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
    rates = [dot.rate for dot in data.dots] + [r.value for r in data.drawn if r.bound == "compute"]
    axes.set_ylim(min(rates) / TERA / 3, max(rates) / TERA * 3)
    chart_axes.log(axes, "x")
    chart_axes.log(axes, "y")
    axes.set_xlabel("arithmetic intensity, FLOP per byte")
    axes.set_ylabel("throughput, TFLOP/s")
    for dot in data.dots:
        _mark(axes, dot, look)
    fix(figure)
    return figure, _write_labels(axes, data, look, named)


def _mark(axes: Axes, dot: Dot, look: Look) -> None:
    """Draw a case: filled, and hollow if it is in doubt."""
    colour = paint(look.colours[dot.entry.case.implementation])
    doubt = bool(dot.entry.case.roofline.doubt)
    axes.plot(
        dot.intensity,
        dot.rate / TERA,
        linestyle="none",
        marker=look.shapes.marker(dot.entry.case.base),
        markersize=7,
        markerfacecolor=paint("paper") if doubt else (colour, 0.5),  # marks below stay visible
        markeredgecolor=colour,
        markeredgewidth=1.8 if doubt else 1.0,
    )


def _span(data: RooflineData) -> tuple[float, float]:
    """Return the range of intensities to show: every case, and the ridge point."""
    shown = [dot.intensity for dot in data.dots]
    ridge_point = ridge(data.drawn)
    shown += [ridge_point] if ridge_point else []
    return min(shown) / 4, max(shown) * 4


def _write_labels(axes: Axes, data: RooflineData, look: Look, named: bool) -> int:
    """Draw the roofs and label everything; return how many labels found no room."""
    points = [pixel(axes, dot.intensity, dot.rate / TERA) for dot in data.dots]
    ends = [_draw_roof(axes, roof, data.drawn) for roof in data.drawn]
    lines = [stretch(start, end) for start, end in ends]
    room = Room(axes, [around(point, 5) for point in points], list(chain.from_iterable(lines)))
    for roof, own, between in reversed(list(zip(data.drawn, lines, ends, strict=True))):
        pairs = zip(data.drawn, lines, strict=True)
        others = [box for one, line in pairs if line is not own and one.bound == roof.bound for box in line]
        _label_roof(room, roof, between, own, others)
    if len(data.dots) <= MOST_LABELS:
        for dot, point in sorted(zip(data.dots, points, strict=True), key=lambda pair: -pair[0].rate):
            case = dot.entry.case
            name = printable(f"{case.scenario}, {case.implementation}", LETTERS) if named else ""
            others = [around(other, 0) for other in points if math.dist(other, point) > SAME]
            _label_dot(room, dot, point, others, look.colours[case.implementation], name)
    return room.left_out


def _label_roof(
    room: Room, roof: Roof, ends: tuple[Point, Point], own: Sequence[Box], others: Sequence[Box]
) -> None:
    """Write a roof's name where no other line is nearer; a slope with others beside it has a line to it."""
    on_it = partial(along, *ends, above=roof.bound == "compute")

    def places(size: Point) -> Iterator[Box]:
        yield from clear(on_it(size), own, others)
        if roof.bound == "memory":
            for apart in AWAY:
                yield from along(*ends, size, above=False, apart=apart)
            yield from below((ends[0][0] + AWAY[0], ends[0][1]), size)

    label = _roof_label(roof)
    box = room.put((label, places), (label.removeprefix("limit "), places))
    if box and min(gap(box, one) for one in own) > AWAY[0] / 2:
        (left, bottom), (right, top) = ends
        height = min(max((box.bottom + box.top) / 2, bottom), top)
        room.lead(box, (left + (right - left) * (height - bottom) / (top - bottom), height))


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
    detail = f" ({printable(roof.detail, DETAIL)})" if roof.detail else ""
    return f"limit {value}{detail}"


def _rate(roof: Roof) -> str:
    return f"{number(roof.value / 1e9)} GB/s"


def _label_dot(room: Room, dot: Dot, point: Point, others: Sequence[Box], colour: str, name: str) -> None:
    """Write a case's name and share of its limit where no other mark is nearer."""
    limit = dot.entry.case.roofline
    share = "in doubt" if limit.doubt else "" if limit.fraction is None else f"{100 * limit.fraction:.0f} %"
    text = " ".join(filter(None, (name, share)))

    def places(size: Point, rings: int = NEAR if name else FAR) -> Iterator[Box]:
        return clear(beside(point, size, rings=rings), [around(point, 0)], others, by=0.5)

    if text:
        room.tie(room.put((text, partial(places, rings=NEXT)), (text, places)), point, colour)
