"""A picture of the report with everything that explains it, and what all pictures of one report share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mla.bench.report.series import Entry, Source, entries, grouped, titles, workload
from mla.bench.report.style import Palette, Swatch
from mla.bench.report.tables import Table
from mla.bench.results.compare import Comparison
from mla.bench.results.schema import Case

#: Rows of one picture, and of a table that is shown beside its picture.
MOST_ROWS, MOST_BESIDE = 40, 24


@dataclass(frozen=True)
class Picture:
    """Drawings with their legend, notes and the tables behind them."""

    slug: str
    title: str
    drawings: list[str] = field(default_factory=list)  # SVG
    legend: list[Swatch] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    beside: bool = False  # the tables are shown beside the drawings, else below them on demand


class Context:
    """The files of a report, and what colours mean in all of its pictures."""

    def __init__(self, files: Sequence[Source]) -> None:
        self.files = files
        self.entries = entries(files)
        self.titles = titles(map(workload, self.entries))
        self.colours = Palette(entry.colour_key for entry in self.entries)

    def legend(self, found: Iterable[Entry]) -> list[Swatch]:
        """Return a swatch per colour among the cases; the device is named where there are several files."""
        members = [group[0] for group in grouped(found, lambda entry: entry.colour_key).values()]
        several = len({entry.source.key for entry in members}) > 1
        files = [f"{entry.source.label}: " * several for entry in members]
        return [
            Swatch(file + entry.case.implementation, self.colours[entry.colour_key])
            for file, entry in zip(files, members, strict=True)
        ]


def file_title(source: Source) -> str:
    """Return device and config of a file."""
    return ", ".join(filter(None, (source.label, source.config)))


def row_names(found: Sequence[Entry]) -> list[str]:
    """Name rows by implementation, and by scenario where there are several."""
    if len({entry.case.scenario for entry in found}) == 1:
        return [entry.name for entry in found]
    return [f"{entry.name}, {entry.case.scenario}" for entry in found]


def case_name(case: Case | Comparison) -> str:
    """Name a case within one file."""
    return f"{case.scenario}, {case.implementation}"


def cut_note(drawn: Sequence[object], found: Sequence[object]) -> list[str]:
    """Say that not all rows are drawn, if so."""
    cut = len(drawn) < len(found)
    return [f"Drawn are the first {len(drawn)} of {len(found)}; the table has all."] if cut else []


def is_short(table: Table) -> bool:
    """Say whether a table may stand beside its picture."""
    return len(table.rows) <= MOST_BESIDE
