"""Draw the roofline of one file."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mla.bench.report import chart_axes
from mla.bench.report.charts import WIDTH
from mla.bench.report.roofline_data import Roof, RooflineData, ridge
from mla.bench.report.series import printable
from mla.bench.report.style import DARK, GREY, Look
from mla.bench.report.svg import inline, styled
from mla.bench.terminal.digits import number

# In points: the height of a label, and the distance below which two overlap.
HEIGHT, REACH = 9.0, 34.0
# With more cases than this, none is labelled; the table next to the chart has their numbers.
MOST_LABELS = 16
TERA = 1e12


@styled()
def roofline(slug: str, title: str, data: RooflineData, look: Look) -> str:
    """Draw every case of a file under its known roofs."""
    figure = Figure(figsize=(WIDTH, 4.0), layout="constrained")
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
            color=look.colours[dot.entry.colour_key],
            markersize=7,
            markerfacecolor="none",  # overlapping dots stay visible
            markeredgewidth=1.8,
        )
    figure.draw_without_rendering()  # where labels go is known only after the layout
    _draw_roofs(axes, data.roofs)
    _label_dots(axes, data)
    return inline(figure, slug, title)


def _span(data: RooflineData) -> tuple[float, float]:
    """Return the range of intensities to show: every case, and the ridge point."""
    shown = [dot.intensity for dot in data.dots]
    ridge_point = ridge(data.roofs)
    shown += [ridge_point] if ridge_point else []
    return min(shown) / 4, max(shown) * 4


def _draw_roofs(axes: Axes, roofs: Sequence[Roof]) -> None:
    flat = [roof.value for roof in roofs if roof.bound == "compute"]
    steep = [roof.value for roof in roofs if roof.bound == "memory"]
    low, high = axes.get_xlim()
    for roof in roofs:
        if roof.bound == "compute":
            start = max(low, roof.value / max(steep)) if steep else low
            _flat_roof(axes, roof, start, high)
        else:
            _steep_roof(axes, roof, low, min(high, max(flat) / roof.value) if flat else high)


def _flat_roof(axes: Axes, roof: Roof, start: float, end: float) -> None:
    height = roof.value / TERA
    axes.plot([start, end], [height, height], color=DARK, linewidth=1.2)
    text = printable(f"{number(height)} TFLOP/s {roof.detail}", chart_axes.LABEL)
    axes.annotate(
        text, (end, height), (-2, 3), textcoords="offset points", ha="right", va="bottom", fontsize=8
    )


def _steep_roof(axes: Axes, roof: Roof, start: float, end: float) -> None:
    slope = roof.value / TERA
    start = max(start, axes.get_ylim()[0] / slope)
    axes.plot([start, end], [start * slope, end * slope], color=DARK, linewidth=1.2)
    (x0, y0), (x1, y1) = axes.transData.transform([(start, start * slope), (end, end * slope)])
    axes.annotate(
        printable(f"{number(roof.value / 1e9)} GB/s {roof.detail}", chart_axes.LABEL),
        (start, start * slope),
        (6, 8),
        textcoords="offset points",
        rotation=math.degrees(math.atan2(y1 - y0, x1 - x0)),
        rotation_mode="anchor",
        ha="left",
        va="bottom",
        fontsize=8,
    )


def _label_dots(axes: Axes, data: RooflineData) -> None:
    """Write each case's share of its limit next to it, below any label or roof that it would overlap."""
    if len(data.dots) > MOST_LABELS or axes.figure is None:
        return
    scale = 72 / axes.figure.dpi
    flat = [r.value / TERA for r in data.roofs if r.bound == "compute"]
    lines = [axes.transData.transform((1, height))[1] * scale for height in flat]
    placed: list[tuple[float, float]] = []
    for dot in sorted(data.dots, key=lambda dot: -dot.rate):
        fraction = dot.entry.case.roofline.fraction
        if fraction is None:
            continue
        where = (dot.intensity, dot.rate / TERA)
        x, y = (coordinate * scale for coordinate in axes.transData.transform(where))
        height = min([y, *(line - HEIGHT / 1.5 for line in lines if abs(line - y) < HEIGHT / 1.5)])
        height = min([height, *(other - HEIGHT for near, other in placed if abs(near - x) < REACH)])
        placed.append((x, height))
        axes.annotate(
            f"{100 * fraction:.0f} %",
            where,
            (10, height - y),
            textcoords="offset points",
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6} if y - height > 2 else None,
        )
