"""Every colour of the report by its name, for light and for dark surroundings, and as CSS. Pure."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Mode = Literal["light", "dark"]


class Tone(NamedTuple):
    """One colour as it looks on light and on dark paper."""

    light: str
    dark: str


# What series are drawn in. In both modes each has a contrast of at least 3 to the paper, and any two differ
# for every kind of colour vision. The first three are Okabe and Ito's.
SERIES: dict[str, Tone] = {
    "s1": Tone("#0072b2", "#3e95d0"),
    "s2": Tone("#d55e00", "#f2873b"),
    "s3": Tone("#009e73", "#43cf86"),
    "s4": Tone("#c27aab", "#f59ebd"),
    "s5": Tone("#0093ff", "#9dceff"),
    "s6": Tone("#744800", "#ffd243"),
    "s7": Tone("#222222", "#fff6f8"),
    "s8": Tone("#882255", "#bd6192"),
    "s9": Tone("#929551", "#beef7c"),
}
# Text, and marks that say something: at least 4.5 to the paper.
WORDS: dict[str, Tone] = {
    "ink": Tone("#1c1c1c", "#e8e8e6"),
    "soft": Tone("#595959", "#a9adb2"),
    "link": Tone("#0057a0", "#7db8f0"),
    "good": Tone("#00664b", "#5fd0a5"),
    "wrong": Tone("#b00020", "#ff8a93"),
    "doubt": Tone("#6a2c91", "#cfa0f2"),
    "absent": Tone("#8a5200", "#e9b44c"),
}
# Axes and limits: at least 3.
MARKS: dict[str, Tone] = {"axis": Tone("#777777", "#8a8f96")}
# Paper, and lines that only guide the eye.
SURFACES: dict[str, Tone] = {
    "paper": Tone("#ffffff", "#15181c"),
    "code": Tone("#f4f4f2", "#1f2429"),
    "rule": Tone("#dcdcdc", "#3a4047"),
    "grid": Tone("#e0e0e0", "#2e343a"),
    "band": Tone("#eeeeee", "#262b31"),
}


def luminance(colour: str) -> float:
    """Return the relative luminance of a colour "#rrggbb", as WCAG defines it."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of two colours, from 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _ink_on(colour: str) -> str:
    return max(("#000000", "#ffffff"), key=lambda ink: contrast(ink, colour))


# Text on an area of a series: black or white, whichever can be read.
INKS = {f"on-{name}": Tone(_ink_on(tone.light), _ink_on(tone.dark)) for name, tone in SERIES.items()}
THEME: dict[str, Tone] = {**SERIES, **WORDS, **MARKS, **SURFACES, **INKS}

# matplotlib knows no variables: while it draws, a name is this colour with the name's number.
_STAND_IN = "#fe00"
_NUMBERS = {name: f"{_STAND_IN}{place:02x}" for place, name in enumerate(THEME)}
_NAMES = {colour: name for name, colour in _NUMBERS.items()}
_ANY = re.compile(_STAND_IN + "[0-9a-f]{2}")


def paint(name: str) -> str:
    """Return what a chart is drawn with to have the colour `name`."""
    return _NUMBERS[name]


def var(name: str) -> str:
    """Return a colour in CSS."""
    return f"var(--{name})"


def variables(style: str) -> str:
    """Return the CSS of a drawn element with the colours' names in it."""
    return _ANY.sub(lambda found: var(_NAMES[found[0]]), style)


def css(mode: Mode) -> str:
    """Return the declarations that give every name its colour in one mode."""
    return " ".join(f"--{name}: {getattr(tone, mode)};" for name, tone in THEME.items())
