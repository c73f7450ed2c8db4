"""Tables and pictures of a comparison with `transformers`.

    python -m benchmarks.transformers.summary benchmarks/transformers/results/NAME.json [--pictures FOLDER]

Tables go to stdout, as Markdown. `transformers` is the faster of its sides, each time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.transformers import drawing
from benchmarks.transformers.record import Row, read
from mla.bench.report import pictures
from mla.bench.report.draw.svg import Caption
from mla.bench.results.stats import median
from mla.bench.terminal.digits import number
from mla.command.console import note, out
from mla.command.table import markdown
from mla.errors import ResultError

TIMES = (
    "tokens",
    "`transformers`: ms",
    "of which attention",
    "with",
    "`use_mla`: ms",
    "of which attention",
    "as fast",
    "attention",
    "`PagedCache`: ms",
    "as fast",
)
MEMORY = (
    "tokens",
    "phase",
    "`transformers` MiB",
    "`use_mla` MiB",
    "of it",
    "`PagedCache` MiB",
    "of it",
    "cache bytes per token: `transformers`",
    "`use_mla`",
    "`PagedCache`",
)
TITLES = {
    "decode": "A decode step after so many tokens",
    "append": "64 tokens appended to so many",
    "prefill": "Prefill of a whole prompt",
}


@dataclass(frozen=True)
class Point:
    """One phase at one length: `transformers` at its fastest, if it has a number, and our ops."""

    length: int
    phase: str
    stock: Row | None
    ours: Row
    paged: Row
    why_not: str  # stock has no number

    def times(self) -> tuple[str, ...]:
        """Return the cells of a row of times."""
        stock = ("-", "-", self.why_not)
        if self.stock is not None:
            kind = f"{self.stock.side}, {self.stock.dtype}"
            stock = (number(middle(self.stock.model_ms)), number(middle(self.stock.attention_ms)), kind)
        ours = (number(middle(self.ours.model_ms)), number(middle(self.ours.attention_ms)))
        faster = (self._ratio(self.ours, _model), self._ratio(self.ours, _attention))
        paged = (number(middle(self.paged.model_ms)), self._ratio(self.paged, _model))
        return str(self.length), *stock, *ours, *faster, *paged

    def _ratio(self, row: Row, times: Callable[[Row], float]) -> str:
        return "-" if self.stock is None else f"{number(times(self.stock) / times(row))}x"

    def memory(self) -> tuple[str, ...]:
        """Return the cells of a row of memory: weights, cache, and what a forward takes besides."""
        stock = self.stock.total_bytes if self.stock is not None else None
        cells = [str(self.length), self.phase, _mib(stock)]
        for row in (self.ours, self.paged):
            cells += [_mib(row.total_bytes), f"{row.total_bytes / stock:.2f}" if stock else "-"]
        each = (self.stock, self.ours, self.paged)
        return *cells, *(f"{row.cache_bytes / row.tokens:.0f}" if row else "-" for row in each)


def middle(rounds: Sequence[Sequence[float]]) -> float:
    """Return the median of the medians of rounds."""
    return median([median(one) for one in rounds])


def _model(row: Row) -> float:
    return middle(row.model_ms)


def _attention(row: Row) -> float:
    return middle(row.attention_ms)


def _mib(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.0f}"


def _total(row: Row) -> float:
    return row.total_bytes / 2**20


# Phase, title, label and quantity of each picture.
PICTURES: dict[str, tuple[str, str, str, Callable[[Row], float]]] = {
    "decode": ("decode", "Time of a decode step", "ms", _model),
    "prefill": ("prefill", "Time of a prefill", "ms", _model),
    "memory": ("decode", "Memory of a decode step", "MiB", _total),
}


def points(rows: Iterable[Row]) -> list[Point]:
    """Return what was measured of one config, in its order."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row.phase, row.history or row.new_tokens), []).append(row)
    return [_point(phase, length, group) for (phase, length), group in found.items()]


def _point(phase: str, length: int, rows: Sequence[Row]) -> Point:
    ours, paged = (next(row for row in rows if row.side == side) for side in ("mla", "mla-paged"))
    theirs = [row for row in rows if row not in (ours, paged)]
    stock = min((row for row in theirs if row.model_ms), key=_model, default=None)
    why = next((row.left_out for row in theirs if "GiB" in row.left_out), "")
    return Point(length, phase, stock, ours, paged, why)


def tables(config: str, found: Sequence[Point]) -> str:
    """Return a table of times for each phase, and one of memory."""
    parts = []
    for phase, title in TITLES.items():
        if of_phase := [point.times() for point in found if point.phase == phase]:
            parts.append(f"### {config}: {title[0].lower()}{title[1:]}\n\n{markdown(TIMES, of_phase)}")
    memory = markdown(MEMORY, [point.memory() for point in found])
    return "\n".join([*parts, f"### {config}: memory\n\n{memory}"])


def draw(config: str, device: str, found: Sequence[Point]) -> dict[str, str]:
    """Return pictures of the times of decode and prefill, and of the memory that a decode step needs."""
    subject = f"{config}: one layer, one request; {device}"
    made: dict[str, str] = {}
    for name, (phase, title, label, of) in PICTURES.items():
        points = [point for point in found if point.phase == phase]
        lines = {
            "transformers": [(point.length, of(point.stock)) for point in points if point.stock is not None],
            "mla": [(point.length, of(point.ours)) for point in points],
            "mla, PagedCache": [(point.length, of(point.paged)) for point in points],
        }
        lines = {one: line for one, line in lines.items() if line}
        if lines:
            finding = "; ".join(f"{one}: {_span(line)}" for one, line in lines.items())
            caption = Caption(f"{config}-{name}", title, finding)
            made |= drawing.render(f"{config}-{name}", caption, subject, label, lines)
    return made


def _span(points: Sequence[tuple[int, float]]) -> str:
    """Say how a line begins and ends."""
    return " to ".join(f"{number(value)} at {tokens} tokens" for tokens, value in (points[0], points[-1]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables, and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("record", type=Path)
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="write the pictures there")
    asked = parser.parse_args(arguments)
    try:
        record = read(asked.record)
    except ResultError as error:
        note(f"error: {error}")
        return 1
    configs = {row.config: [one for one in record.rows if one.config == row.config] for row in record.rows}
    for config, rows in configs.items():
        found = points(rows)
        out(tables(config, found))
        if asked.pictures:
            device = f"{record.device}, {record.threads} threads"
            pictures.write(draw(config, device, found), asked.pictures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
