"""Tables, sentences and pictures of a comparison with `transformers`.

    python -m benchmarks.transformers.summary RECORD.json [--pictures FOLDER]

Tables and sentences go to stdout, as Markdown, and what pictures show in words to stderr. Each party is shown
at its best: `transformers` with the attention, dtype and allocator that are the fastest, ours with the faster
allocator.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import get_args

from benchmarks.transformers.records import NAMES, Group, Point, attention, groups, read
from benchmarks.transformers.tables import sentences, tables
from mla.bench.report import figures, page
from mla.bench.terminal.digits import number
from mla.command.console import note, out
from mla.errors import ResultError

WIDTH = 120  # of a line of Markdown


def _attention(group: Group, point: Point, party: str) -> float | None:
    row = point.best(party)
    return None if row is None else attention(row)


def _memory(group: Group, point: Point, party: str) -> float | None:
    needed = point.needed(party, group.layers)
    return None if needed is None else needed / 2**20


# Phase, title, label and quantity of each picture.
Quantity = Callable[[Group, Point, str], "float | None"]
PICTURES: dict[str, tuple[str, str, str, Quantity]] = {
    "decode": ("decode", "Attention of a decode step", "ms", _attention),
    "prefill": ("prefill", "Attention of a prefill", "ms", _attention),
    "memory": ("decode", "Memory of all attention layers in a decode step", "MiB", _memory),
}


def text(group: Group) -> str:
    """Return tables and sentences, under headings."""
    listed = (
        textwrap.fill(sentence, WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
        for sentence in sentences(group)
    )
    lines = "\n".join(listed)
    return "\n".join([*tables(group), f"### {group.title}: in words\n\n{lines}\n"])


def draw(group: Group, device: str) -> dict[str, str]:
    """Return pictures of attention in decode and prefill, and of the memory of decode steps."""
    made: dict[str, str] = {}
    for name, (phase, title, label, of) in PICTURES.items():
        lines = {party: list(_line(group, phase, party, of)) for party in NAMES}
        lines = {party: line for party, line in lines.items() if line}
        if lines:
            finding = "; ".join(f"{name}: {_span(line, label)}" for name, line in lines.items())
            drawn = figures.curves(list(map(_drawn, lines, lines.values())), [], ("tokens", label))
            subject = f"{group.config}: one request; {device}"
            chart = figures.Chart(f"{group.config}-{name}", title, subject, f"{finding}.", drawn)
            for mode in get_args(figures.Mode):
                made[f"{chart.name}-{mode}.svg"] = figures.svg(chart, mode, figures.NARROW, titled=True)
            note(f"{group.config}-{name}: {title}. {finding}.")
    return made


def _drawn(party: str, line: Sequence[tuple[int, float]]) -> figures.Line:
    """Return a party's line as it is drawn in all pictures."""
    place = list(NAMES).index(party)
    look = list(figures.SERIES)[place], figures.MARKERS[place], figures.DASHES[place]
    return figures.Line(party, *look, [figures.Point(*point) for point in line])


def _line(group: Group, phase: str, party: str, of: Quantity) -> Iterable[tuple[int, float]]:
    """Yield a party's points."""
    for point in group.of(phase):
        if (value := of(group, point, party)) is not None:
            yield point.length, value


def _span(line: Sequence[tuple[int, float]], label: str) -> str:
    """Say how a line begins and ends."""
    return " to ".join(f"{number(value)} {label} at {tokens} tokens" for tokens, value in (line[0], line[-1]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print tables and sentences, and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=Path)
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="write the pictures there, of one request"
    )
    asked = parser.parse_args(arguments)
    try:
        record = read(asked.record)
    except ResultError as error:
        note(f"error: {error}")
        return 1
    compared = groups(record.rows, record.label)
    out("\n".join(map(text, compared)))
    for group in compared:
        if asked.pictures and group.requests == 1:
            page.write_pictures(draw(group, f"{record.device}, {record.threads} threads"), asked.pictures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
