"""The one writer of tables, in plain text and Markdown, and progress on stderr. Needs no torch.

Progress is a bar on a terminal, gone when the work is done, and a line now and then elsewhere.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterable, Sequence

from rich import progress
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mla.command.console import note, results_stream

_UNLIMITED_COLUMNS = 10_000  # a truncated number is worse than a wrapped one
_FILE_COLUMNS = 100  # of a result that goes to a file or a pipe


def width() -> int:
    """Return how many columns a result may take: those of its terminal, and 100 where it goes elsewhere."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        return int(columns)
    try:
        return os.get_terminal_size(results_stream().fileno()).columns or _FILE_COLUMNS
    except (AttributeError, OSError, ValueError):  # no terminal; the stream of a test or a notebook
        return _FILE_COLUMNS


def has_colours() -> bool:
    """Return whether a result goes to a terminal, or to what was declared one."""
    return Console(file=results_stream()).is_terminal


def aligned(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    words: Iterable[str] = (),
    *,
    styles: Sequence[str] | None = None,
    wrapped: Iterable[str] = (),
) -> str:
    """Return columns two spaces apart; those titled `words` are aligned left, all others right.

    `styles` are the colours of the rows, as rich names them; without any, the table is plain text. Cells of
    columns titled `wrapped` take several lines where the table would else be wider than the result.
    """
    grid, left = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style=""), set(words)
    for title in header:
        grid.add_column(
            Text(title),
            justify="left" if title in left else "right",
            no_wrap=title not in wrapped,
            overflow="fold",
        )
    for place, row in enumerate(rows):
        grid.add_row(*map(Text, row), style=styles[place] if styles else "")
    coloured = styles is not None
    wide = Console(
        file=io.StringIO(),
        width=width() if wrapped else _UNLIMITED_COLUMNS,
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


# -------------------------------------------------------------------------------------------------- progress

# Seconds until the first line where stderr is not a terminal; the next takes twice as long, up to the most.
EVERY, SELDOM = 30.0, 120.0

# Columns of what is read from a file.
BYTES = (progress.DownloadColumn(), progress.TransferSpeedColumn())


class Progress:
    """Counts forwards, or the bytes of a file with the columns `BYTES`; says what is running."""

    def __init__(
        self, total: float | None, what: str = "starting", columns: Iterable[progress.ProgressColumn] = ()
    ) -> None:
        console = Console(stderr=True)
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            *columns,
            progress.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
            speed_estimate_period=3600,  # scenarios differ: a short window would see only one of them
            auto_refresh=False,  # a refresh thread would disturb the timed region
        )
        self._task = self._bar.add_task(what, total=total)
        self._total, self._done, self._every = total or 1.0, 0.0, EVERY
        self._said = time.monotonic()

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._bar.stop()

    def advance(self, what: str, done: float) -> None:
        """Record that so many forwards are done. Called outside timed regions only."""
        self._bar.update(self._task, description=what, advance=done)
        self._bar.refresh()
        self._done += done
        now = time.monotonic()
        if self._bar.disable and now - self._said >= self._every:
            self._said, self._every = now, min(2 * self._every, SELDOM)
            note(f"running    {what}, {self._done / self._total:.0%} of the plan")

    def reach(self, done: int, total: int) -> None:
        """Record that `done` bytes of `total` have been read."""
        self._bar.update(self._task, completed=done, total=total)
        self._bar.refresh()

    def say(self, text: str) -> None:
        """Print a line of news where there is no bar; the next line on what runs is then due later."""
        if self._bar.disable:
            self._said = time.monotonic()
            note(text)
