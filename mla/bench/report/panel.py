"""A panel of the report: charts with legend, notes and tables; and the context all panels share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from mla.bench.report.draw.style import Colours, Swatch
from mla.bench.report.draw.svg import Caption
from mla.bench.report.series import ReportEntry, ResultFile, entries, titles, workload
from mla.bench.report.tables import Table
from mla.bench.results.compare import Comparison
from mla.bench.results.schema import Case

T = TypeVar("T")

# Most rows in one chart, in all charts of a panel, and in a table that is shown alongside its chart.
MOST_ROWS, ALL_ROWS, MOST_ALONGSIDE = 16, 40, 24


@dataclass(frozen=True)
class Picture:
    """One drawing, and what it shows and says in words."""

    name: str  # of a file: lower case, without extension
    caption: Caption
    svg: str


@dataclass(frozen=True)
class Panel:
    """Pictures with their legend, notes and the tables behind them."""

    slug: str
    title: str
    subject: str = ""  # device, config: what was measured
    drawings: list[Picture] = field(default_factory=list)
    legend: list[Swatch] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    alongside: bool = False  # tables are shown alongside the drawings, otherwise below them on demand


class Context:
    """The files of a report, and what colours mean in all its panels."""

    def __init__(self, files: Sequence[ResultFile]) -> None:
        self.files = files
        self.entries = entries(files)
        self.titles = titles(map(workload, self.entries))
        self.colours = Colours(entry.case.implementation for entry in self.entries)

    def subject(self, drawn: Sequence[ReportEntry]) -> str:
        """Return which devices and configs cases are of, with the letters of their files."""
        return "; ".join(dict.fromkeys(map(_subject, drawn)))

    def legend(self, drawn: Iterable[ReportEntry]) -> list[Swatch]:
        """Return a swatch per implementation among the cases."""
        names = dict.fromkeys(entry.case.implementation for entry in drawn)
        return [Swatch(name, self.colours[name]) for name in names]


def _subject(entry: ReportEntry) -> str:
    return ", ".join(filter(None, (entry.file.label, entry.file.config, entry.case.dtype)))


def chunks(rows: Sequence[T]) -> list[Sequence[T]]:
    """Return the rows of each chart: as many charts as it takes for none to be longer than a page."""
    count = math.ceil(len(rows) / MOST_ROWS)
    return [rows[len(rows) * k // count : len(rows) * (k + 1) // count] for k in range(count)]


def numbered(name: str, place: int) -> str:
    """Return a name, with a number if it is not the first of its kind."""
    return f"{name}-{place + 1}" if place else name


def file_title(file: ResultFile) -> str:
    """Return letter, device and config of a file."""
    return ", ".join(filter(None, (file.label, file.config)))


def row_names(drawn: Sequence[ReportEntry]) -> list[str]:
    """Name rows by implementation, and by scenario if there are several."""
    if len({entry.case.scenario for entry in drawn}) == 1:
        return [entry.name for entry in drawn]
    return [f"{entry.name}, {entry.case.scenario}" for entry in drawn]


def case_name(case: Case | Comparison) -> str:
    """Name a case within one file."""
    return f"{case.scenario}, {case.implementation}"


def cut_note(drawn: Sequence[object], every: Sequence[object]) -> list[str]:
    """Return a note if not all rows are drawn."""
    cut = len(drawn) < len(every)
    return [f"The first {len(drawn)} of {len(every)} are drawn; the table has all of them."] if cut else []


def is_short(table: Table) -> bool:
    """Return whether a table is short enough to stand alongside its chart."""
    return len(table.rows) <= MOST_ALONGSIDE
