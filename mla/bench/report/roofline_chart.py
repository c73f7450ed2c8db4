"""Draw the roofline of one file."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mla.bench.report import chart_axes as axis
from mla.bench.report.charts import WIDTH
from mla.bench.report.roofline_data import Roof, Roofline, ridge
from mla.bench.report.series import printable
from mla.bench.report.style import DARK, GREY, Look
from mla.bench.report.svg import inline, styled
from mla.bench.terminal.digits import number

#: Points: the height of a label, and how near two must be to run into each other.
HEIGHT, REACH = 9.0, 34.0
#: More cases than this get no label; the table beside the picture has their numbers.
MOST_LABELS = 16
TERA = 1e12


@styled()
def roofline(slug: str, title: str, found: Roofline, look: Look) -> str:
    """Draw every case of a file under the roofs that are known."""
    figure = Figure(figsize=(WIDTH, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlim(*_span(found))
    rates = [dot.rate for dot in found.dots] + [r.value for r in found.roofs if r.bound == "compute"]
    axes.set_ylim(min(rates) / TERA / 3, max(rates) / TERA * 3)
    axis.log(axes, "x")
    axis.log(axes, "y")
    axes.set_xlabel("arithmetic intensity, FLOP per byte")
    axes.set_ylabel("TFLOP/s")
    for dot in found.dots:
        axes.plot(
            dot.intensity,
            dot.rate / TERA,
            linestyle="none",
            marker=look.shapes.marker(dot.entry.case.base),
            color=look.colours[dot.entry.colour_key],
            markersize=7,
            markerfacecolor="none",  # one below another stays visible
            markeredgewidth=1.8,
        )
    figure.draw_without_rendering()  # where labels go is known only after the layout
    _draw_roofs(axes, found.roofs)
    _label_dots(axes, found)
    return inline(figure, slug, title)


def _span(found: Roofline) -> tuple[float, float]:
    """Return the intensities to show: every case, and where the roofs meet."""
    shown = [dot.intensity for dot in found.dots]
    meeting = ridge(found.roofs)
    shown += [meeting] if meeting else []
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
    text = printable(f"{number(height)} TFLOP/s {roof.detail}", axis.LABEL)
    axes.annotate(
        text, (end, height), (-2, 3), textcoords="offset points", ha="right", va="bottom", fontsize=8
    )


def _steep_roof(axes: Axes, roof: Roof, start: float, end: float) -> None:
    slope = roof.value / TERA
    start = max(start, axes.get_ylim()[0] / slope)
    axes.plot([start, end], [start * slope, end * slope], color=DARK, linewidth=1.2)
    (x0, y0), (x1, y1) = axes.transData.transform([(start, start * slope), (end, end * slope)])
    axes.annotate(
        printable(f"{number(roof.value / 1e9)} GB/s {roof.detail}", axis.LABEL),
        (start, start * slope),
        (6, 8),
        textcoords="offset points",
        rotation=math.degrees(math.atan2(y1 - y0, x1 - x0)),
        rotation_mode="anchor",
        ha="left",
        va="bottom",
        fontsize=8,
    )


def _label_dots(axes: Axes, found: Roofline) -> None:
    """Write the share of the limit beside each case, below the label or roof that it would run into."""
    if len(found.dots) > MOST_LABELS or axes.figure is None:
        return
    scale = 72 / axes.figure.dpi
    flat = [r.value / TERA for r in found.roofs if r.bound == "compute"]
    lines = [axes.transData.transform((1, height))[1] * scale for height in flat]
    placed: list[tuple[float, float]] = []
    for dot in sorted(found.dots, key=lambda one: -one.rate):
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
