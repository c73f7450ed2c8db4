"""Where labels of a chart go: boxes that never meet, inside the chart, near to their points. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A rectangle in points; the origin is at the lower left."""

    left: float
    bottom: float
    right: float
    top: float

    def meets(self, other: Box) -> bool:
        """Return whether two boxes overlap."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.bottom < other.top
            and other.bottom < self.top
        )

    def holds(self, other: Box) -> bool:
        """Return whether the other box lies inside."""
        return (
            self.left <= other.left
            and self.bottom <= other.bottom
            and other.right <= self.right
            and other.top <= self.top
        )


def around(point: Point, reach: float) -> Box:
    """Return the square around a point."""
    x, y = point
    return Box(x - reach, y - reach, x + reach, y + reach)


def beside(point: Point, size: Point, *, gap: float = 7.0, rings: int = 12) -> Iterator[Box]:
    """Yield places for a label of a size near a point: right, left, below and above, then farther away."""
    (x, y), (width, height) = point, size
    for ring, step in itertools.product(range(rings), (-1, 1)):
        if ring or step == -1:
            middle = y + step * ring * (height / 2 + 1) - height / 2
            for left in (x + gap, x - gap - width, x - width / 2):
                if left != x - width / 2 or abs(middle + height / 2 - y) > height / 2 + gap - 1:
                    yield Box(left, middle, left + width, middle + height)


def along(start: Point, end: Point, size: Point, *, above: bool, steps: int = 24) -> Iterator[Box]:
    """Yield places for a label that touches a line: on its upper or its lower right side, from its end on."""
    width, height = size
    for step in range(steps + 1):
        share = 1 - step / steps
        x, y = (a + share * (b - a) for a, b in zip(start, end, strict=True))
        yield Box(x - width, y + 2, x, y + 2 + height) if above else Box(x + 5, y - height, x + 5 + width, y)


def place(candidates: Iterable[Box], inside: Box, taken: Sequence[Box]) -> Box | None:
    """Return the first candidate that lies inside and meets nothing; None if all do."""
    for box in candidates:
        if inside.holds(box) and not any(box.meets(other) for other in taken):
            return box
    return None


def stretch(start: Point, end: Point, reach: float = 1.0, most: int = 60) -> list[Box]:
    """Return small boxes that cover a line, so that labels keep off it."""
    length = max(abs(end[0] - start[0]), abs(end[1] - start[1]))
    count = max(1, min(most, round(length / 4)))
    shares = [step / count for step in range(count + 1)]
    points = [(start[0] + s * (end[0] - start[0]), start[1] + s * (end[1] - start[1])) for s in shares]
    return [around(point, max(reach, length / count / 2)) for point in points]
