"""The one writer of tables, in plain text and Markdown, for every command. Needs no torch."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mla.command.console import results_stream

# Wider than any line: a truncated number is worse than a wrapped one.
_WIDE = 10_000
# Columns of a result that goes to a file or a pipe.
_NARROW = 100


def width() -> int:
    """Return how many columns a result may take: those of its terminal, and 100 where it goes elsewhere."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        return int(columns)
    try:
        return os.get_terminal_size(results_stream().fileno()).columns or _NARROW
    except (AttributeError, OSError, ValueError):  # no terminal; the stream of a test or a notebook
        return _NARROW


def has_colours() -> bool:
    """Return whether a result goes to a terminal, or to what was declared one."""
    return Console(file=results_stream()).is_terminal


def table(kind: str, header: Sequence[str], rows: Iterable[Sequence[str]], words: Iterable[str] = ()) -> str:
    """Return a table as `markdown` for the kind "md", and `aligned` for any other."""
    return markdown(header, rows) if kind == "md" else aligned(header, rows, words)


def aligned(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    words: Iterable[str] = (),
    *,
    styles: Sequence[str] | None = None,
) -> str:
    """Return columns two spaces apart; those titled `words` are aligned left, all others right.

    `styles` are the colours of the rows, as rich names them; without any, the table is plain text.
    """
    grid, left = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style=""), set(words)
    for title in header:
        grid.add_column(Text(title), justify="left" if title in left else "right", no_wrap=True)
    for place, row in enumerate(rows):
        grid.add_row(*map(Text, row), style=styles[place] if styles else "")
    coloured = styles is not None
    wide = Console(
        file=io.StringIO(),
        width=_WIDE,
        force_terminal=coloured,
        color_system="standard" if coloured else None,
    )
    wide.print(grid)
    lines = wide.file.getvalue().splitlines()  # type: ignore[attr-defined]  # a StringIO
    return "".join(f"{line.rstrip()}\n" for line in lines)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], *, padded: bool = False) -> str:
    """Return a Markdown table with bars in cells escaped; `padded` keeps it readable as plain text."""
    lines = [list(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    widths = [max(map(len, column)) if padded else 0 for column in zip(*lines, strict=True)]
    cells = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    rule = "|".join("-" * (width + 2) if padded else " --- " for width in widths)
    head, *body = (f"| {' | '.join(line)} |\n" for line in cells)
    return "".join([head, f"|{rule}|\n", *body])
