"""Colours (by name), markers and dashes: one meaning each in all panels, distinguishable without colour."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass

from mla.bench.report.draw.theme import SERIES, var

COLOURS = tuple(SERIES)

# Implementations that have the same colour in every report, by their place in the palette.
KNOWN = ("mla", "mla-reference", "transformers", "transformers-eager")

# For lines and marks that belong to no series.
GREY, DARK = "axis", "ink"

# What stands in a chart for a case without a number, by the status of its check, and its colour.
MISSING = {"wrong": ("✗", "wrong"), "doubtful": ("?", "doubt"), "not run": ("\N{EN DASH}", "absent")}

# matplotlib's markers, each with the path of its swatch in a 16 x 16 box.
MARKERS = {
    "o": "M8 3.5a4.5 4.5 0 1 1 0 9a4.5 4.5 0 1 1 0-9z",
    "s": "M4 4h8v8h-8z",
    "^": "M8 3l5 9.5h-10z",
    "D": "M8 2.5l5.5 5.5l-5.5 5.5l-5.5-5.5z",
    "v": "M8 13l5-9.5h-10z",
    "p": "M8 2.5l5.5 4l-2.1 6.5h-6.8l-2.1-6.5z",
    ">": "M13 8l-9.5 5v-10z",
    "<": "M3 8l9.5-5v10z",
}
MARKER_NAMES = tuple(MARKERS)
MARKERS["|"] = "M7 1h2v14h-2z"  # stands for a mark over a bar

# Dashes by their lengths in points.
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (2, 2), (7, 2, 2, 2), (1, 1.5), (9, 3))


@dataclass(frozen=True)
class Swatch:
    """One line of a legend: a filled box, or a marker with or without a line through it."""

    text: str
    colour: str
    marker: str = ""
    dash: tuple[float, ...] | None = None  # None: no line

    @property
    def path(self) -> str:
        """Outline of the marker, in a 16 x 16 box."""
        return MARKERS.get(self.marker, "")

    @property
    def paint(self) -> str:
        """The colour in CSS."""
        return var(self.colour)

    @property
    def dashes(self) -> str:
        """The line's dashes in SVG notation."""
        return " ".join(f"{length:g}" for length in self.dash or ())


class Palette:
    """Colours by order of first appearance."""

    def __init__(self, keys: Iterable[Hashable]) -> None:
        self._places = {key: place for place, key in enumerate(dict.fromkeys(keys))}

    def __getitem__(self, key: Hashable) -> str:
        return COLOURS[self._places[key] % len(COLOURS)]

    def marker(self, key: Hashable) -> str:
        """Return the marker of a key."""
        return MARKER_NAMES[self._places[key] % len(MARKER_NAMES)]

    def dash(self, key: Hashable) -> tuple[float, ...]:
        """Return the dashes of a key."""
        return DASHES[self._places[key] % len(DASHES)]


class Colours:
    """Colours of implementations by their names: the same in all files, panels and, if free, all reports."""

    def __init__(self, names: Iterable[str]) -> None:
        self._places: dict[str, int] = {}
        for name in sorted(set(names), key=lambda name: (name not in KNOWN, name)):
            self._places[name] = self._place(name)

    def _place(self, name: str) -> int:
        """Return the name's own place, or the next that is free, while some are."""
        if name in KNOWN:
            return KNOWN.index(name)
        others = len(COLOURS) - len(KNOWN)
        first = zlib.crc32(name.encode("utf-8", "replace")) % others
        wanted = [len(KNOWN) + (first + step) % others for step in range(others)] + list(range(len(KNOWN)))
        taken = set(self._places.values())
        return next((place for place in wanted if place not in taken), wanted[0])

    def __getitem__(self, name: str) -> str:
        return COLOURS[self._places[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)


@dataclass(frozen=True)
class Look:
    """What colours and markers mean in one panel."""

    colours: Colours
    shapes: Palette

    @property
    def dashes(self) -> Palette:
        """The dashes of implementations, which tell lines apart where there is no colour."""
        return Palette(self.colours)
