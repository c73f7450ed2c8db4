"""Lines over the number of cached tokens, in the style of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

from matplotlib.figure import Figure

from mla.bench.report import pictures
from mla.bench.report.draw import chart_axes, theme
from mla.bench.report.draw.style import Colours, Palette, Swatch
from mla.bench.report.draw.svg import WIDTH, Caption, inline, styled
from mla.bench.report.panel import Panel, Picture

Lines = Mapping[str, Sequence[tuple[int, float]]]


def render(name: str, caption: Caption, subject: str, label: str, lines: Lines) -> dict[str, str]:
    """Return the picture's files by their names, for light and for dark surroundings."""
    colours, shapes = Colours(lines), Palette(lines)
    legend = [Swatch(one, colours[one], shapes.marker(one), dash=shapes.dash(one)) for one in lines]
    picture = Picture(name, caption, _chart(caption, label, lines, colours, shapes))
    panel = Panel(caption.slug, caption.title, subject, [picture], legend)
    return {f"{name}-{mode}.svg": pictures.alone(panel, picture, mode) for mode in get_args(theme.Mode)}


@styled()
def _chart(caption: Caption, label: str, lines: Lines, colours: Colours, shapes: Palette) -> str:
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained", dpi=72)  # a pixel is a point
    axes = figure.add_subplot()
    for name, points in lines.items():
        dash = shapes.dash(name)
        axes.plot(
            *zip(*points, strict=True),
            color=theme.paint(colours[name]),
            marker=shapes.marker(name),
            markersize=5,
            linewidth=1.4,
            linestyle=(0, dash) if dash else "-",
        )
    chart_axes.places(axes, [tokens for points in lines.values() for tokens, _ in points])
    chart_axes.log(axes, "y")
    axes.set_xlabel("tokens")
    axes.set_ylabel(label)
    return inline(figure, caption)
