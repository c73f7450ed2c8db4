"""The tables of the report. Every cell is text; numbers look as they do in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mla.bench.report.roofline_data import Roof, Roofline
from mla.bench.report.series import Curves, Entry, Measure, Quantity, passes, position
from mla.bench.results import stats
from mla.bench.results.compare import Comparison
from mla.bench.results.schema import Case, Interval, Latency, Timing
from mla.bench.terminal import run_table as render
from mla.bench.terminal.digits import number
from mla.bench.terminal.stages import total


@dataclass(frozen=True)
class Table:
    """Rows of cells. The first `names` columns are words, and the last if `remarks`, others numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 1
    remarks: bool = False

    def is_words(self, column: int) -> bool:
        """Say whether a column holds words."""
        return column < self.names or (self.remarks and column == len(self.head) - 1)


@dataclass(frozen=True)
class ResultRow:
    """A case as the terminal shows it; `reason` says what is wrong with it."""

    cells: Sequence[str]
    wrong: bool
    reason: str


def result_rows(cases: Iterable[Case]) -> list[ResultRow]:
    """Return the rows of the result table, columns `render.COLUMNS`."""
    rows = []
    for case in cases:
        cells = [cell(case) for cell in render.COLUMNS.values()]
        bad = case.check.status != "ok"
        rows.append(ResultRow(cells, case.check.status == "wrong", case.check.reason if bad else ""))
    return rows


def interval(found: Interval | None) -> str:
    """Return an interval, "-" where there is none."""
    return "-" if found is None else f"{number(found[0])} .. {number(found[1])}"


def _measure(found: Measure | None) -> tuple[str, str]:
    """Return the cells of a median and its interval."""
    if found is None:
        return "-", "-"
    bounds = None if found.low is None or found.high is None else (found.low, found.high)
    return number(found.value), interval(bounds)


def _who(entry: Entry) -> list[str]:
    """Return the cells that name a case: its file, where there are several, scenario and implementation."""
    return [entry.source.key] * bool(entry.source.key) + [entry.case.scenario, entry.case.implementation]


def _who_head(found: Sequence[Entry]) -> list[str]:
    return ["file"] * bool(found and found[0].source.key) + ["scenario", "implementation"]


def curve(found: Curves, quantities: Sequence[Quantity]) -> Table:
    """Return the points of all lines."""
    members = [entry for line in found.lines for _, entry in line.points]
    return _quantities(members, quantities, found.axis)


def bars(found: Sequence[Entry], quantities: Sequence[Quantity]) -> Table:
    """Return the values of all bars."""
    return _quantities(found, quantities)


def _quantities(found: Sequence[Entry], quantities: Sequence[Quantity], axis: str = "") -> Table:
    head = [*_who_head(found), *[axis] * bool(axis)]
    names = len(head) - bool(axis)
    for quantity in quantities:
        head += [f"{quantity.name} {quantity.unit}", "95% CI"]
    rows = []
    for entry in found:
        row = _who(entry) + ([f"{position(entry.case, axis):g}"] if axis else [])
        for quantity in quantities:
            row += _measure(quantity.of(entry.case))
        rows.append(row)
    return Table(head, rows, names)


def roofline(found: Roofline) -> Table:
    """Return where every case lies and how near its limit it comes."""
    head = ["scenario", "implementation", "limit", "FLOP/byte", "TFLOP/s", "GB/s", "floor ms", "% of limit"]
    rows = []
    for dot in found.dots:
        case = dot.entry.case
        limit = case.roofline
        rate = [number(dot.intensity), number(dot.rate / 1e12), number(dot.rate / dot.intensity / 1e9)]
        share = "-" if limit.fraction is None else f"{100 * limit.fraction:.0f}"
        row = [case.scenario, case.implementation, limit.bound or "-", *rate, number(limit.floor_ms)]
        rows.append([*row, share])
    return Table(head, rows, 3)


def roofs(found: Sequence[Roof]) -> Table:
    """Return the limits and where they are from."""
    rows = []
    for roof in found:
        size, unit = (1e9, "GB/s") if roof.bound == "memory" else (1e12, "TFLOP/s")
        rows.append(
            [roof.bound, roof.detail or "-", roof.source or "-", f"{number(roof.value / size)} {unit}"]
        )
    return Table(["limit", "of", "source", "value"], rows, 3)


def stages(found: Sequence[Entry]) -> Table:
    """Return every stage with its share of the sum and of its own limit."""
    head = [*_who_head(found), "stage", "ms", "% of the sum", "% of limit", "bound by"]
    rows = []
    for entry in found:
        whole = total(entry.case.stages)
        for stage in entry.case.stages:
            limit = stage.roofline
            near = "-" if limit is None or limit.fraction is None else f"{100 * limit.fraction:.0f}"
            share = f"{100 * stage.ms / whole:.0f}" if whole else "-"
            bound = (limit.bound if limit else None) or "-"
            rows.append([*_who(entry), stage.name, number(stage.ms), share, near, bound])
    return Table(head, rows, len(_who_head(found)) + 1)


def timings(found: Sequence[Entry]) -> Table:
    """Return the headline of every case and its further timings, with their checks."""
    head = ["scenario", "implementation", "timed", "ms", "95% CI", "ratio", "check"]
    rows = []
    for entry in found:
        case = entry.case
        who = [case.scenario, case.implementation]
        rows.append([*who, f"headline, {case.clock}", *_latency(case.latency_ms), "1", case.check.status])
        for one in case.timings:
            ratio = "-"
            if one.latency_ms and case.latency_ms:
                ratio = number(one.latency_ms.median / case.latency_ms.median)
            rows.append([*who, timing_name(one), *_latency(one.latency_ms), ratio, one.check.status])
    return Table(head, rows, 3)


def _latency(found: Latency | None) -> tuple[str, str]:
    return (number(found.median), interval(found.ci95)) if found else ("-", "-")


def timing_name(one: Timing) -> str:
    """Return what is special about a timing, such as "graph, cold, host": mode, cache, clock."""
    return f"{one.mode}, {one.cache}, {one.clock}"


def comparison(found: Sequence[Comparison]) -> Table:
    """Return every case of a file against the base, refusals with their reason."""
    head = ["scenario", "implementation", "verdict", "base ms", "new ms", "time ratio", "90% CI", "remark"]
    rows = []
    for one in found:
        bounds = f"{one.interval[0]:.3f} .. {one.interval[1]:.3f}" if one.interval else "-"
        ratio = "-" if one.ratio is None else f"{one.ratio:.3f}"
        times = (number(one.base_ms), number(one.new_ms))
        rows.append([one.scenario, one.implementation, one.verdict, *times, ratio, bounds, one.reason])
    if any(one.reason for one in found):
        return Table(head, rows, 3, True)
    return Table(head[:-1], [row[:-1] for row in rows], 3)


def pass_table(found: Sequence[Entry]) -> Table:
    """Return what every pass was like: the samples themselves are in the result file."""
    head = [*_who_head(found), "pass", "forwards", "min ms", "median ms", "p90 ms", "max ms"]
    rows = []
    for entry in found:
        for place, samples in enumerate(passes(entry.case), start=1):
            summary = (min(samples), stats.median(samples), stats.percentile(samples, 90), max(samples))
            rows.append([*_who(entry), str(place), str(len(samples)), *map(number, summary)])
    return Table(head, rows, len(_who_head(found)))


def columns() -> list[str]:
    """Return the titles of the result table."""
    return list(render.COLUMNS)
