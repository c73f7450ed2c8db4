"""Every colour of the report, for light and for dark paper: as CSS, and as matplotlib's settings. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle
from typing import Any, Literal, NamedTuple

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
# Text, at least 4.5 to the paper; axes, at least 3; and what only guides the eye.
THEME: dict[str, Tone] = {
    **SERIES,
    "ink": Tone("#1c1c1c", "#e8e8e6"),
    "soft": Tone("#595959", "#a9adb2"),
    "link": Tone("#0057a0", "#7db8f0"),
    "good": Tone("#00664b", "#5fd0a5"),
    "wrong": Tone("#b00020", "#ff8a93"),
    "doubt": Tone("#6a2c91", "#cfa0f2"),
    "amber": Tone("#8a5200", "#e9b44c"),
    "axis": Tone("#777777", "#8a8f96"),
    "paper": Tone("#ffffff", "#15181c"),
    "code": Tone("#f4f4f2", "#1f2429"),
    "rule": Tone("#dcdcdc", "#3a4047"),
    "grid": Tone("#e0e0e0", "#2e343a"),
    "band": Tone("#eeeeee", "#262b31"),
}
# Implementations that have the same colour in every report, by their place in the palette.
KNOWN = ("mla", "mla-reference", "transformers", "transformers-eager")
_PLACES = {name: f"C{place}" for place, name in enumerate(THEME)}


def paint(name: str) -> str:
    """Return what matplotlib calls the colour `name` under the settings of `rc`, in either mode."""
    return _PLACES[name]


def css(mode: Mode) -> str:
    """Return the declarations that give every name its colour in one mode."""
    return " ".join(f"--{name}: {getattr(tone, mode)};" for name, tone in THEME.items())


def rc(mode: Mode) -> dict[Any, Any]:
    """Return matplotlib's settings for one mode; all others are its defaults.

    Text stays text, so that it can be searched and copied; it is never mathematics.
    """
    tones = {name: getattr(tone, mode) for name, tone in THEME.items()}
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "mla",
        "text.parse_math": False,
        "font.sans-serif": ["DejaVu Sans", "Verdana", "Geneva"],
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.prop_cycle": f"cycler(color={list(tones.values())!r})",
        "axes.edgecolor": tones["axis"],
        "axes.facecolor": "none",
        "axes.labelcolor": tones["ink"],
        "figure.facecolor": tones["paper"],
        "grid.color": tones["grid"],
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "errorbar.capsize": 2.5,
        "text.color": tones["ink"],
        **{f"{axis}tick.color": tones["axis"] for axis in "xy"},
        **{f"{axis}tick.labelcolor": tones["ink"] for axis in "xy"},
    }


def colours(names: Iterable[str]) -> dict[str, str]:
    """Return a colour per implementation, the same in all charts; those of `KNOWN` are in all reports."""
    styles = dict(zip(KNOWN, SERIES, strict=False))
    rest = cycle([*list(SERIES)[len(KNOWN) :], *SERIES])
    return styles | dict(zip(sorted(set(names) - set(KNOWN)), rest, strict=False))
