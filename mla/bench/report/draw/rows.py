"""Rows of a chart: each has its name above what is drawn, so that long names leave room on a phone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate

from matplotlib.axes import Axes

from mla.bench.report.draw.theme import paint
from mla.bench.report.series import printable

# Most characters in a line of a name, and most lines of it; tables show it whole.
LETTERS, LINES = 46, 3
# Inches of a line of a name, of what is drawn below it, and of the gap to the next row.
LINE, BAR, GAP = 0.15, 0.19, 0.1


def wrapped(name: str) -> str:
    """Return a name for a chart: one with a list of ops is wrapped behind a comma, then cut to `LINES`."""
    lines = [""]
    for part in re.split(r"(?<=,)", printable(name)):
        if lines[-1] and len(lines[-1] + part) > LETTERS and len(lines) < LINES:
            lines.append("")
        lines[-1] += part
    return "\n".join(printable(line, LETTERS) for line in lines)


class Rows:
    """Where rows lie on a y axis that counts inches from the top."""

    def __init__(self, names: Sequence[str], bar: float = BAR, head: float = 0.0) -> None:
        self.names, self.bar = [wrapped(name) for name in names], bar
        heights = [LINE * (1 + name.count("\n")) + bar + GAP for name in self.names]
        *self._tops, self.height = accumulate([head, *heights])

    @property
    def middles(self) -> list[float]:
        """Where the middle of each row's bar is."""
        ends = [*self._tops[1:], self.height]
        return [end - GAP - self.bar / 2 for end in ends]

    def set(self, axes: Axes) -> None:
        """Give a chart these rows and write their names."""
        axes.set_ylim(self.height, 0)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        for top, name in self._named():
            axes.text(
                0,
                top,
                name,
                transform=axes.get_yaxis_transform(),
                va="top",
                bbox={"facecolor": paint("paper"), "edgecolor": "none", "pad": 0.5, "alpha": 0.85},
            )

    def _named(self) -> Iterator[tuple[float, str]]:
        return zip(self._tops, self.names, strict=True)
