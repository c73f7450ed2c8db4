"""Writing labels into a chart wherever there is room for them."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import IdentityTransform

from mla.bench.report.draw.labels import Box, Point, around, place
from mla.bench.report.draw.theme import paint

# Where a label of a size may go, the best first.
Places = Callable[[Point], Iterable[Box]]
SIZE = 9.0  # of a label's font, in points


def fix(figure: Figure) -> None:
    """Lay a figure out for good: where labels go is known only then, and they must not change it."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def pixel(axes: Axes, x: float, y: float) -> Point:
    """Return where a value is; a pixel is a point, if the figure has 72 dots per inch."""
    spot = axes.transData.transform((x, y))
    return float(spot[0]), float(spot[1])


@dataclass
class Room:
    """What is taken in a chart. Labels may cross lines, but only if nothing else is free."""

    axes: Axes
    taken: list[Box]
    lines: list[Box] = field(default_factory=list)
    left_out: int = 0

    def put(self, *tries: tuple[str, Places]) -> Box | None:
        """Write the first text for which one of its places is free; return None if there is no room."""
        box = next(filter(None, (self._put(text, places) for text, places in tries)), None)
        self.left_out += box is None
        return box

    def _put(self, text: str, places: Places) -> Box | None:
        drawn = self.axes.text(0, 0, text, fontsize=SIZE, va="bottom", transform=IdentityTransform())
        frame = self.axes.bbox
        inside = Box(frame.x0 + 1, frame.y0 + 1, frame.x1, frame.y1)
        boxes = list(places(_size(drawn)))
        box = place(boxes, inside, self.taken + self.lines) or place(boxes, inside, self.taken)
        if box is None:
            drawn.remove()
            return None
        drawn.set_position((box.left + 1, box.bottom + 1))
        drawn.set_bbox({"facecolor": paint("paper"), "edgecolor": "none", "pad": 0.5, "alpha": 0.8})
        self.taken.append(box)
        return box

    def tie(self, box: Box | None, point: Point, colour: str) -> None:
        """Draw a line from a point to its label if that is not next to it."""
        if box is None or box.meets(around(point, 11)):
            return
        end = (min(max(point[0], box.left), box.right), min(max(point[1], box.bottom), box.top))
        xs, ys = zip(point, end, strict=True)
        self.axes.plot(xs, ys, color=paint(colour), linewidth=0.8, transform=IdentityTransform(), zorder=1)

    def lead(self, box: Box, point: Point) -> None:
        """Draw a line from a dot on a line to the middle of its label, which is elsewhere."""
        xs, ys = (point[0], box.left), (point[1], (box.bottom + box.top) / 2)
        style: dict[str, Any] = {"color": paint("ink"), "linewidth": 0.8, "marker": "o", "markersize": 3}
        self.axes.plot(xs, ys, **style, markevery=[0], transform=IdentityTransform(), zorder=3)


def _size(text: Text) -> Point:
    """Return width and height, with room for fonts that are a little wider, and for glyphs this one lacks."""
    extent = text.get_window_extent()
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text.get_text())
    return 1.06 * extent.width + 0.5 * SIZE * wide + 2, extent.height + 2
