"""Where labels of a chart go: boxes that never meet, inside the chart, near to their points. Pure."""

from __future__ import annotations

import itertools
import math
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


def gap(one: Box, other: Box) -> float:
    """Return the distance between two boxes; 0 if they touch."""
    across = max(one.left - other.right, other.left - one.right, 0.0)
    return math.hypot(across, max(one.bottom - other.top, other.bottom - one.top, 0.0))


def clear(
    candidates: Iterable[Box], own: Sequence[Box], others: Sequence[Box], by: float = 0.0
) -> Iterator[Box]:
    """Yield the places of a label whose middle line is nearer to what is its own than to others."""
    for box in candidates:
        middle = (box.bottom + box.top) / 2
        line = Box(box.left, middle, box.right, middle)
        near, far = (min((gap(line, one) for one in boxes), default=math.inf) for boxes in (own, others))
        if near + by < far:
            yield box


def beside(point: Point, size: Point, *, gap: float = 7.0, rings: int = 12) -> Iterator[Box]:
    """Yield places for a label of a size near a point: right, left, below and above, then farther away."""
    (x, y), (width, height) = point, size
    for ring, step in itertools.product(range(rings), (-1, 1)):
        if ring or step == -1:
            middle = y + step * ring * (height / 2 + 1) - height / 2
            for left in (x + gap, x - gap - width, x - width / 2):
                if left != x - width / 2 or abs(middle + height / 2 - y) > height / 2 + gap - 1:
                    yield Box(left, middle, left + width, middle + height)


def along(
    start: Point, end: Point, size: Point, *, above: bool, apart: float = 5.0, steps: int = 24
) -> Iterator[Box]:
    """Yield places for a label at a line: on it, or `apart` to its lower right, from the line's end on."""
    width, height = size
    for step in range(steps + 1):
        share = 1 - step / steps
        x, y = (a + share * (b - a) for a, b in zip(start, end, strict=True))
        yield Box(x - width, y + 2, x, y + 2 + height) if above else _right(x + apart, y, size)


def _right(left: float, top: float, size: Point) -> Box:
    return Box(left, top - size[1], left + size[0], top)


def below(point: Point, size: Point, most: int = 9) -> Iterator[Box]:
    """Yield places for a label under a point, one line after another."""
    return (_right(point[0], point[1] - line * (size[1] + 2), size) for line in range(most))


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
