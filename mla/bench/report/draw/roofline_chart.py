"""Draw the roofline of one file."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import IdentityTransform

from mla.bench.report.draw import chart_axes
from mla.bench.report.draw.charts import WIDTH
from mla.bench.report.draw.labels import Box, Point, along, around, beside, place, stretch
from mla.bench.report.draw.svg import inline, styled
from mla.bench.report.roofline_data import Dot, Roof, RooflineData, ridge
from mla.bench.report.series import printable
from mla.bench.report.style import DARK, Look
from mla.bench.terminal.digits import number

# With more cases than this, none is labelled; the table next to the chart has their numbers.
MOST_LABELS = 16
SIZE = 8.0  # of a label's font, in points
TERA = 1e12


@styled()
def roofline(slug: str, title: str, data: RooflineData, look: Look) -> tuple[str, int]:
    """Draw every case of a file under its known roofs; also return how many labels found no room."""
    figure, left_out = draw(data, look)
    return inline(figure, slug, title), left_out


def draw(data: RooflineData, look: Look) -> tuple[Figure, int]:
    """Return the chart and how many of its labels found no room."""
    figure = Figure(figsize=(WIDTH, 4.0), layout="constrained", dpi=72)  # a pixel is a point
    axes = figure.add_subplot()
    axes.set_xlim(*_span(data))
    rates = [dot.rate for dot in data.dots] + [r.value for r in data.roofs if r.bound == "compute"]
    axes.set_ylim(min(rates) / TERA / 3, max(rates) / TERA * 3)
    chart_axes.log(axes, "x")
    chart_axes.log(axes, "y")
    axes.set_xlabel("arithmetic intensity, FLOP per byte")
    axes.set_ylabel("TFLOP/s")
    for dot in data.dots:
        axes.plot(
            dot.intensity,
            dot.rate / TERA,
            linestyle="none",
            marker=look.shapes.marker(dot.entry.case.base),
            color=look.colours[dot.entry.case.implementation],
            markersize=7,
            markerfacecolor="none",  # overlapping dots stay visible
            markeredgewidth=1.8,
        )
    figure.draw_without_rendering()  # where labels go is known only after the layout,
    figure.set_layout_engine("none")  # which they must not change
    return figure, _write_labels(axes, data, look)


def _span(data: RooflineData) -> tuple[float, float]:
    """Return the range of intensities to show: every case, and the ridge point."""
    shown = [dot.intensity for dot in data.dots]
    ridge_point = ridge(data.roofs)
    shown += [ridge_point] if ridge_point else []
    return min(shown) / 4, max(shown) * 4


@dataclass
class _Room:
    """What is taken in a chart. Labels may cross lines, but only if nothing else is free."""

    axes: Axes
    taken: list[Box]
    lines: list[Box]
    left_out: int = 0

    def put(self, text: str, places: Callable[[Point], Iterable[Box]]) -> Box | None:
        """Write a label at the first of `places` (by its size) that is free; None if there is no room."""
        drawn = self.axes.text(0, 0, text, fontsize=SIZE, va="bottom", transform=IdentityTransform())
        frame = self.axes.bbox
        inside = Box(frame.x0 + 1, frame.y0 + 1, frame.x1, frame.y1)
        boxes = list(places(_size(drawn)))
        box = place(boxes, inside, self.taken + self.lines) or place(boxes, inside, self.taken)
        if box is None:
            drawn.remove()
            self.left_out += 1
            return None
        drawn.set_position((box.left + 1, box.bottom + 1))
        drawn.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8})
        self.taken.append(box)
        return box


def _size(text: Text) -> Point:
    """Return width and height, with room for fonts that are a little wider, and for glyphs this one lacks."""
    extent = text.get_window_extent()
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text.get_text())
    return 1.06 * extent.width + 0.5 * SIZE * wide + 2, extent.height + 2


def _write_labels(axes: Axes, data: RooflineData, look: Look) -> int:
    """Draw the roofs and label everything; return how many labels found no room."""
    points = [_pixel(axes, dot.intensity, dot.rate / TERA) for dot in data.dots]
    ends = [_draw_roof(axes, roof, data.roofs) for roof in data.roofs]
    lines = [box for start, end in ends for box in stretch(start, end)]
    room = _Room(axes, [around(point, 5) for point in points], lines)
    for roof, (start, end) in zip(data.roofs, ends, strict=True):
        room.put(_roof_label(roof), partial(along, start, end, above=roof.bound == "compute"))
    if len(data.dots) <= MOST_LABELS:
        for dot, point in sorted(zip(data.dots, points, strict=True), key=lambda pair: -pair[0].rate):
            _label_dot(room, dot, point, look.colours[dot.entry.case.implementation])
    return room.left_out


def _pixel(axes: Axes, x: float, y: float) -> Point:
    place = axes.transData.transform((x, y))
    return float(place[0]), float(place[1])


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
    axes.plot(ends, height, color=DARK, linewidth=1.2)
    return _pixel(axes, ends[0], height[0]), _pixel(axes, ends[1], height[1])


def _roof_label(roof: Roof) -> str:
    """Return a roof's value and what distinguishes it from the others of its kind."""
    if roof.bound == "compute":
        return printable(f"{number(roof.value / TERA)} TFLOP/s {roof.detail}", chart_axes.LABEL)
    return printable(f"{number(roof.value / 1e9)} GB/s {roof.detail}", chart_axes.LABEL)


def _label_dot(room: _Room, dot: Dot, point: Point, colour: str) -> None:
    """Write a case's share of its limit beside it, with a line to it if it is not next to it."""
    limit = dot.entry.case.roofline
    text = "in doubt" if limit.doubt else limit.fraction is not None and f"{100 * limit.fraction:.0f} %"
    box = room.put(text, partial(beside, point)) if text else None
    if box is None or box.meets(around(point, 11)):
        return
    end = (min(max(point[0], box.left), box.right), min(max(point[1], box.bottom), box.top))
    xs, ys = zip(point, end, strict=True)
    room.axes.plot(xs, ys, color=colour, linewidth=0.8, transform=IdentityTransform(), zorder=1)
