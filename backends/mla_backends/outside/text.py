"""Words from files and plugins, made fit for a terminal and for a sentence."""

from __future__ import annotations

import re

MOST_QUOTED = 200  # characters of a value

# What a terminal may be sent besides printable text: line ends, tabs, and our own colours.
_LAYOUT = re.compile(r"\r?\n|\t|\x1b\[[0-9;]*m")


def escaped(text: str) -> str:
    r"""Return text with unprintable characters escaped: controls, line ends, bidi marks ("\x1b")."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def safe(text: str) -> str:
    """Return text that acts on no terminal: `escaped`, but for line ends, tabs and colours."""
    if text.isprintable():
        return text
    kept = [*_LAYOUT.findall(text), ""]
    return "".join(escaped(part) + mark for part, mark in zip(_LAYOUT.split(text), kept, strict=True))


def shortened(text: str, most: int = MOST_QUOTED) -> str:
    """Return text of at most `most` characters: its middle is left out where it is longer."""
    half = (most - 5) // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


def quoted(value: object) -> str:
    """Return the `repr` of a value from a file, `escaped` and `shortened`."""
    try:
        return shortened(escaped(repr(value)))
    except (ValueError, RecursionError):  # an integer of thousands of digits; lists in lists without end
        return f"a {type(value).__name__} that is too large to print"
