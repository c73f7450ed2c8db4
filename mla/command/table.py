"""Tables in plain text and Markdown, for every command. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]], words: Iterable[str] = ()) -> str:
    """Return columns two spaces apart; those titled `words` are aligned left, all others right."""
    lines = [header, *rows]
    widths, left = _widths(lines), [title in set(words) for title in header]

    def line(cells: Sequence[str]) -> str:
        padded = zip(cells, widths, left, strict=True)
        return "  ".join(cell.ljust(width) if word else cell.rjust(width) for cell, width, word in padded)

    return "".join(f"{line(cells).rstrip()}\n" for cells in lines)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], *, padded: bool = False) -> str:
    """Return a Markdown table with bars in cells escaped; `padded` keeps it readable as plain text."""
    lines = [list(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    if padded:
        widths = _widths(lines)
        rule = "|".join("-" * (width + 2) for width in widths)
        lines = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    else:
        rule = "|".join([" --- "] * len(header))
    head, *body = (f"| {' | '.join(line)} |\n" for line in lines)
    return "".join([head, f"|{rule}|\n", *body])


def _widths(lines: Iterable[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*lines, strict=True)]
