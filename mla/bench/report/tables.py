"""The tables of the report. Every cell is text; numbers are formatted as in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mla.bench.report.roofline_data import Roof, RooflineData
from mla.bench.report.series import Curves, Measure, Quantity, ReportEntry, position
from mla.bench.results import passes, stats
from mla.bench.results.compare import Comparison
from mla.bench.results.rows import Row
from mla.bench.results.schema import Case, Interval, Latency, Timing
from mla.bench.terminal import run_table
from mla.bench.terminal.digits import between, number
from mla.bench.terminal.stages import total
from mla.bench.terminal.verdict import is_yardstick, status

# Letters that fit beside each other on a phone, that the gap beside a column takes, and that a name has in
# one line at most.
PHONE, NARROW, LONGEST = 46, 2, 60


@dataclass(frozen=True)
class Table:
    """Rows of cells. The first `names` columns hold words, and the last if `reasons`; the others numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 1
    reasons: bool = False
    caption: str = "data"

    @property
    def wide(self) -> bool:
        """Return whether the table may be wider than a phone: it scrolls there, and keys must reach it."""
        columns = zip(self.head, *self.rows, strict=True)
        return sum(NARROW + max(min(len(cell), LONGEST) for cell in column) for column in columns) > PHONE

    def is_words(self, column: int) -> bool:
        """Return whether a column holds words."""
        return column < self.names or (self.reasons and column == len(self.head) - 1)


@dataclass(frozen=True)
class ResultRow:
    """A case as the terminal shows it. `status` is a CSS class; `reason` says what is wrong or in doubt."""

    cells: Sequence[str]
    status: str
    reason: str


def result_rows(found: Sequence[Row]) -> list[ResultRow]:
    """Return the rows of the results table, with the columns of the terminal's."""
    rows, columns = [], run_table.columns([row.case for row in found])
    for row in found:
        case, cells = row.case, [cell(row) for cell in columns.values()]
        bad = case.check.status != "ok"
        reasons = [case.check.reason] * bad + [f"limit or time in doubt: {case.roofline.doubt}"] * bool(
            case.roofline.doubt
        )
        rows.append(ResultRow(cells, css_class(case), "; ".join(filter(None, reasons))))
    return rows


def css_class(case: Case) -> str:
    """Return what colours a case: its status, that it is in doubt, or "yardstick"."""
    if is_yardstick(case):
        return "yardstick"
    if case.check.status == "ok" and case.roofline.doubt:
        return "in-doubt"
    return status(case).replace(" ", "-")


def interval(bounds: Interval | None) -> str:
    """Return an interval; "-" for None."""
    return "-" if bounds is None else f"{number(bounds[0])} .. {number(bounds[1])}"


def _measure(measure: Measure | None) -> tuple[str, str]:
    """Return the cells of a median and its interval."""
    if measure is None:
        return "-", "-"
    return str(measure), between(measure.interval, measure.value, measure.interval)


def _case_cells(entry: ReportEntry) -> list[str]:
    """Return the cells that name a case: its file if there are several, scenario and implementation."""
    return [entry.file.key] * bool(entry.file.key) + [entry.case.scenario, entry.case.implementation]


def _case_titles(entries: Sequence[ReportEntry]) -> list[str]:
    return ["file"] * bool(entries and entries[0].file.key) + ["scenario", "implementation"]


def curve(group: Curves, quantities: Sequence[Quantity]) -> Table:
    """Return the points of all lines."""
    members = [entry for line in group.lines for _, entry in line.points]
    return _quantities(members, quantities, group.axis)


def bars(entries: Sequence[ReportEntry], quantities: Sequence[Quantity]) -> Table:
    """Return the values of all bars."""
    return _quantities(entries, quantities)


def _quantities(entries: Sequence[ReportEntry], quantities: Sequence[Quantity], axis: str = "") -> Table:
    head = [*_case_titles(entries), *[axis] * bool(axis)]
    names = len(head) - bool(axis)
    for quantity in quantities:
        head += [f"{quantity.name} {quantity.unit}", "95% CI"]
    rows = []
    for entry in entries:
        row = _case_cells(entry) + ([f"{position(entry.case, axis):g}"] if axis else [])
        for quantity in quantities:
            row += _measure(quantity.of(entry.case))
        rows.append(row)
    return Table(head, rows, names, caption="values")


def roofline(data: RooflineData) -> Table:
    """Return where every case lies and how near it comes to its limit."""
    head = ["scenario", "implementation", "limit", "FLOP/byte", "TFLOP/s", "GB/s", "floor ms", "% of limit"]
    rows = []
    for dot in data.dots:
        case = dot.entry.case
        limit = case.roofline
        rate = [number(dot.intensity), number(dot.rate / 1e12), number(dot.rate / dot.intensity / 1e9)]
        share = "-" if limit.fraction is None else f"{100 * limit.fraction:.0f}"
        share = "in doubt" if limit.doubt else share
        row = [case.scenario, case.implementation, limit.bound or "-", *rate, number(limit.floor_ms)]
        rows.append([*row, share])
    return Table(head, rows, 3, caption="cases")


def roofs(limits: Sequence[Roof]) -> Table:
    """Return the limits, their sources and how far repeated measurements of them lie apart."""
    rows = []
    for roof in limits:
        factor, unit = (1e9, "GB/s") if roof.bound == "memory" else (1e12, "TFLOP/s")
        value = f"{number(roof.value / factor)} {unit}"
        lowest = "-" if roof.lowest is None else f"{number(roof.lowest / factor)} {unit}"
        source = f"{roof.source or '-'}{' (our own op: nothing outside judges it)' if roof.ours else ''}"
        rows.append([roof.bound, roof.detail or "-", source, value, lowest])
    return Table(["limit", "of", "source", "value", "lowest"], rows, 3, caption="limits")


def new_lengths(entries: Sequence[ReportEntry]) -> Table:
    """Return how forwards on new lengths compare with forwards whose lengths repeat."""
    head = ["new ms", "repeated ms", "ratio", "new plan ms", "repeated plan ms", "forwards"]
    rows = []
    for entry in entries:
        found = entry.case.new_lengths
        if found is not None:
            ratio = found.ms / found.repeated_ms if found.repeated_ms > 0 else None
            times = (found.ms, found.repeated_ms, ratio, found.plan_ms, found.repeated_plan_ms)
            rows.append([*_case_cells(entry), *map(number, times), str(found.forwards)])
    titles = _case_titles(entries)
    return Table([*titles, *head], rows, len(titles), caption="times")


def stages(entries: Sequence[ReportEntry]) -> Table:
    """Return every stage with its share of the sum and of its own limit."""
    head = [*_case_titles(entries), "stage", "ms", "% of the sum", "% of limit", "bound by"]
    rows = []
    for entry in entries:
        whole = total(entry.case.stages)
        for stage in entry.case.stages:
            limit = stage.roofline
            near = "-" if limit is None or limit.fraction is None else f"{100 * limit.fraction:.0f}"
            share = f"{100 * stage.ms / whole:.0f}" if whole else "-"
            bound = (limit.bound if limit else None) or "-"
            rows.append([*_case_cells(entry), stage.name, number(stage.ms), share, near, bound])
    return Table(head, rows, len(_case_titles(entries)) + 1, caption="stages")


def timings(entries: Sequence[ReportEntry]) -> Table:
    """Return the headline of every case and its further timings, with their checks."""
    head = ["scenario", "implementation", "timed", "ms", "95% CI", "ratio", "check"]
    rows = []
    for entry in entries:
        case = entry.case
        names = [case.scenario, case.implementation]
        unit = "1" if case.latency_ms else "-"
        rows.append([*names, f"headline, {case.clock}", *_latency(case.latency_ms), unit, case.check.status])
        for timing in case.timings:
            ratio = "-"
            if timing.latency_ms and case.latency_ms:
                ratio = number(timing.latency_ms.median / case.latency_ms.median)
            withheld = case.check.status in ("wrong", "doubtful")  # no way of timing it counts, then
            cells = (*_latency(None if withheld else timing.latency_ms), ratio, timing.check.status)
            rows.append([*names, timing_name(timing), *cells])
    return Table(head, rows, 3, caption="timings")


def _latency(latency: Latency | None) -> tuple[str, str]:
    return (number(latency.median), interval(latency.ci95)) if latency else ("-", "-")


def timing_name(timing: Timing) -> str:
    """Return mode, cache and clock of a timing, such as "graph, cold, host"."""
    return f"{timing.mode}, {timing.cache}, {timing.clock}"


def comparison(cases: Sequence[Comparison]) -> Table:
    """Return every case of a file compared with the base, refusals with their reason."""
    head = ["scenario", "implementation", "verdict", "base ms", "new ms", "time ratio", "90% CI", "reason"]
    rows = []
    for case in cases:
        bounds = f"{case.interval[0]:.3f} .. {case.interval[1]:.3f}" if case.interval else "-"
        ratio = "-" if case.ratio is None else f"{case.ratio:.3f}"
        times = [number(one.median if one else None) for one in case.times]
        rows.append([case.scenario, case.implementation, case.verdict, *times, ratio, bounds, case.remarks])
    if any(case.remarks for case in cases):
        return Table(head, rows, 3, True, "cases")
    return Table(head[:-1], [row[:-1] for row in rows], 3, caption="cases")


def pass_table(entries: Sequence[ReportEntry]) -> Table:
    """Return statistics of every pass; the samples themselves are in the result file."""
    head = [*_case_titles(entries), "pass", "forwards", "min ms", "median ms", "p90 ms", "max ms"]
    rows = []
    for entry in entries:
        for place, samples in enumerate(passes.of(entry.case), start=1):
            summary = (min(samples), stats.median(samples), stats.percentile(samples, 90), max(samples))
            rows.append([*_case_cells(entry), str(place), str(len(samples)), *map(number, summary)])
    return Table(head, rows, len(_case_titles(entries)), caption="passes")
