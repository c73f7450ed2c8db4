"""Tables of plain text and of markdown. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]], words: Iterable[str] = ()) -> str:
    """Return columns two spaces apart, those titled `words` aligned left and the others right."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = [title in words for title in header]

    def line(cells: Sequence[str]) -> str:
        padded = zip(cells, widths, left, strict=True)
        return "  ".join(cell.ljust(width) if word else cell.rjust(width) for cell, width, word in padded)

    return "".join(f"{line(cells).rstrip()}\n" for cells in lines)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n" for cells in lines
    )
