"""The tables of the report. Every cell is text; numbers are formatted as in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mla.bench.report.data import ResultFile
from mla.bench.results import cases, compare, stats
from mla.bench.results.cases import repeated
from mla.bench.results.compare import scaling
from mla.bench.results.rows import COLUMNS, case_rows, cell, timing_rows
from mla.bench.results.schema import Case
from mla.bench.terminal import run_table
from mla.bench.terminal import tables as terminal
from mla.bench.terminal.digits import estimated, limit, number, percent
from mla.bench.terminal.verdict import is_yardstick, status

NAMES = ("scenario", "implementation")
# Columns of the CSV file that are said once, elsewhere on the page: what ran where.
_ELSEWHERE = {*NAMES, *list(COLUMNS)[:9]}


class Table(NamedTuple):
    """Rows of cells. The first `names` columns hold words, and one called "reason"; the others numbers.

    `marks` are CSS classes of rows, and `remarks` what stands below some of them, by place.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 3
    marks: Sequence[str] = ()
    remarks: Sequence[str] = ()

    def is_words(self, column: int) -> bool:
        """Return whether a column holds words."""
        return column < self.names or self.head[column] == "reason"


def css_class(case: Case) -> str:
    """Return what colours a case: its status, that it is in doubt, or "yardstick"."""
    if is_yardstick(case):
        return "yardstick"
    if case.check.status == "ok" and case.roofline.doubt:
        return "in-doubt"
    return status(case).replace(" ", "-")


def results(file: ResultFile) -> Table:
    """Return the cases of a file with the terminal's columns, and what is wrong or in doubt."""
    columns, remarks = run_table.columns(file.run.cases), []
    for case in file.run.cases:
        doubt = f"suspect limit or time: {case.roofline.doubt}" if case.roofline.doubt else ""
        reason = case.check.reason if case.check.status != "ok" else ""
        remarks.append("; ".join(filter(None, (reason, doubt))))
    rows = [[column(row) for column in columns.values()] for row in case_rows(file.run)]
    return Table("Results", list(columns), rows, 2, list(map(css_class, file.run.cases)), remarks)


def every_number(file: ResultFile) -> Table:
    """Return the columns of the CSV file that say something, for every way in which a case was timed."""
    rows = timing_rows([(Path(file.name), file.run)])
    names = [*NAMES, *(name for name in COLUMNS if name not in _ELSEWHERE)]
    columns = {name.replace("_", " "): [_cell(cell(row, name)) for row in rows] for name in names}
    shown = {name: cells for name, cells in columns.items() if set(cells) != {"-"}}
    return Table(file.title, list(shown), list(zip(*shown.values(), strict=True)), 2)


def _cell(value: object) -> str:
    return number(value) if isinstance(value, float) else "-" if value in (None, "") else str(value)


def scalings(files: Sequence[ResultFile]) -> Table:
    """Return every case that is there on one device and over ranks."""
    rows = []
    for of in scaling([file.run for file in files]):
        for row in of.rows:
            where = [of.scenario, of.implementation, files[row.run].key, row.layout, str(row.resources)]
            rows.append([*where, *terminal.scaling_cells(row)])
    return Table("data", (*NAMES, "file", "layout", "on", *terminal.SCALING_COLUMNS), rows, 5)


def comparison(base: ResultFile, new: ResultFile) -> Table:
    """Return every case of a file compared with the base, refusals with their reason."""
    rows = []
    for case in compare.compare(base.run, new.run):
        ratio = "-" if case.ratio is None else f"{case.ratio:.3f}"
        numbers = [*map(estimated, case.times), ratio, terminal.bounds(case.interval)]
        rows.append([case.scenario, case.implementation, case.verdict, *numbers, case.remarks])
    head = (*NAMES, "verdict", "base ms", "new ms", "time ratio", "90% CI", "reason")
    return Table(f"{new.title} against {base.title}", head, rows)


def _ranks(case: Case) -> Iterator[list[str]]:
    """Yield what each rank did of a case that was spread over several."""
    if case.spread is not None:
        share = repeated(case)
        again = percent(share.of(case.roofline.bound) if share else None)
        for row in terminal.rank_rows(case.spread):
            yield [f"{case.spread.layout} over {case.spread.library}", *row, again]


def _stages(case: Case) -> Iterator[list[str]]:
    """Yield every stage with its share of the sum and of its own limit."""
    whole = terminal.stages_ms(case.stages)
    for stage in case.stages:
        share = percent(stage.ms / whole if whole else None)
        yield [stage.name, number(stage.ms), share, limit(stage.roofline) if stage.roofline else "-"]


def _passes(case: Case) -> Iterator[list[str]]:
    """Yield statistics of every pass; the samples themselves are in the result file."""
    for place, times in enumerate(cases.passes_of(case), start=1):
        summary = (min(times), stats.median(times), stats.percentile(times, 90), max(times))
        yield [str(place), str(len(times)), *map(number, summary)]


# What is shown of each case of a file, by section: the columns, and the rows of a case.
PER_CASE: dict[str, tuple[Sequence[str], Callable[[Case], Iterator[list[str]]]]] = {
    "ranks": (("layout", *terminal.RANK_COLUMNS, "repeated"), _ranks),
    "stages": (("stage", "ms", "of the sum", "% of limit"), _stages),
    "passes": (("pass", "forwards", "min ms", "median ms", "p90 ms", "max ms"), _passes),
}


def per_case(kind: str, file: ResultFile) -> Table:
    """Return a table of all cases of a file, of one of the kinds `PER_CASE`."""
    head, of = PER_CASE[kind]
    rows = [[case.scenario, case.implementation, *cells] for case in file.run.cases for cells in of(case)]
    return Table(file.title, (*NAMES, *head), rows)
