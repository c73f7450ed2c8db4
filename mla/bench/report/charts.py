"""Charts of cases: which go into one, how each looks, and what its caption says. Nothing is drawn yet."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress
from operator import itemgetter
from typing import NamedTuple, TypeVar

from mla.bench.report import figures
from mla.bench.report.figures import DASHES, MARKERS, Chart, Draw, Line, Point, Row, colours
from mla.bench.report.summary import ResultFile
from mla.bench.results.cases import device_cost
from mla.bench.results.schema import Case, Ceiling
from mla.bench.terminal import ceilings, verdict
from mla.bench.terminal.digits import estimated, known, limit, number
from mla.bench.terminal.lines import name as case_name
from mla.bench.terminal.verdict import is_yardstick, status
from mla.text import grouped, size
from mla_backends.outside import shortened

T = TypeVar("T")
# What cases must have in common to appear in one chart: base scenario, op, config and dtype.
Workload = tuple[str, str, str, str]

# Axes of a grid that get curves, and what they count.
AXES = {
    "kv": "history (tokens per request)",
    "batch": "batch (requests)",
    "topk": "selected (tokens per query)",
}
# Most rows in one chart, and most cases that a roofline's legend names; the tables have all of them.
MOST_ROWS, MOST_NAMED = 24, 12
# Most curves and limits in one chart, and most charts into which the curves along one axis are split.
MOST_CURVES, MOST_LIMITS, MOST_PARTS = 8, 2, 6
# Most things that a caption tells one by one, and most verdicts.
MOST_TOLD, MOST_VERDICTS = 6, 3
# Most letters of a title, of what was measured, and of a caption.
LETTERS = (160, 320, 800)


class Entry(NamedTuple):
    """One case and the file it is from."""

    file: ResultFile
    case: Case

    @property
    def name(self) -> str:
        """Name among the cases of one workload, such as "A mla"."""
        return f"{self.file.key} {self.case.implementation}".strip()


def entries(files: Iterable[ResultFile]) -> list[Entry]:
    """Return every case of every file but yardsticks: charts would be flattened by their numbers."""
    return [Entry(file, case) for file in files for case in file.run.cases if not is_yardstick(case)]


def workload(entry: Entry) -> Workload:
    """Return a case's workload; a dtype that is an axis of the grid does not split it."""
    case = entry.case
    return case.base, case.op or "", entry.file.config, "" if "dtype" in case.point else case.dtype


def titles(workloads: Iterable[Workload]) -> dict[Workload, str]:
    """Name each workload by its base scenario and by any other part in which they differ."""
    distinct = list(dict.fromkeys(workloads))
    telling = [at == 0 or len(set(parts)) > 1 for at, parts in enumerate(zip(*distinct, strict=True))]
    return {each: ", ".join(filter(None, compress(each, telling))) for each in distinct}


class Curve(NamedTuple):
    """Cases that differ only along an axis, by place. `others` are the grid's other values, as "batch 8"."""

    entry: Entry  # any: all are of one file and implementation
    others: str
    points: list[tuple[float, Entry]]

    @property
    def name(self) -> str:
        """File, implementation and the grid's other values."""
        return ", ".join(filter(None, (self.entry.name, self.others)))


def curves(cases: Iterable[Entry], axis: str) -> dict[Workload, list[Curve]]:
    """Return the curves along `axis`, for workloads whose grid has numbers at two values of it."""
    by_workload = {}
    for which, members in grouped(cases, workload).items():
        placed = [(x, entry) for entry in members if (x := _position(entry.case, axis)) is not None]
        if len({x for x, entry in placed if entry.case.latency_ms}) > 1:
            groups = grouped(placed, lambda point: (point[1].name, _others(point[1].case, axis)))
            lines = [
                Curve(same[0][1], rest, sorted(same, key=itemgetter(0))) for (_, rest), same in groups.items()
            ]
            timed = [line for line in lines if any(entry.case.latency_ms for _, entry in line.points)]
            by_workload[which] = timed
    return by_workload


def _position(case: Case, axis: str) -> float | None:
    """Return a case's place on an axis; None if its grid has no such axis or the value is not a number."""
    try:
        return float(case.point[axis])
    except (KeyError, ValueError):
        return None


def _others(case: Case, axis: str) -> str:
    return ", ".join(f"{name} {value}" for name, value in case.point.items() if name != axis)


def bars(cases: Sequence[Entry]) -> dict[Workload, list[Entry]]:
    """Return the cases that are on no curve, by workload; workloads without any number are left out."""
    lines = [line for axis in AXES for group in curves(cases, axis).values() for line in group]
    on_curve = {id(entry.case) for line in lines for _, entry in line.points}
    groups = grouped((entry for entry in cases if id(entry.case) not in on_curve), workload).items()
    return {which: same for which, same in groups if any(entry.case.latency_ms for entry in same)}


def roofs_of(file: ResultFile) -> list[Ceiling]:
    """Return the limits to draw: the highest and the lowest bandwidth, and the highest rate of each dtype."""
    known = sorted(file.run.ceilings, key=lambda roof: -roof.value)
    read, compute = ([roof for roof in known if roof.work == work] for work in ("read", "matmul"))
    highest = [of_dtype[0] for of_dtype in grouped(compute, lambda roof: roof.dtype).values()]
    return [*read[:1], *read[1:][-1:], *highest]


class Charts:
    """The charts of some files. Colours are those of implementations, the same in all charts."""

    def __init__(self, files: Sequence[ResultFile]) -> None:
        self.files = files
        self.entries = entries(files)
        self._titles = titles(map(workload, self.entries))
        self._colours = colours(entry.case.implementation for entry in self.entries)

    def grid(self) -> Iterator[Chart]:
        """Yield the latency along each axis of a grid, split by other values if these are many."""
        for axis in AXES:
            for which, group in curves(self.entries, axis).items():
                parts = list(grouped(group, lambda curve: curve.others).values())
                kept = parts[:: math.ceil(len(parts) / MOST_PARTS)] if len(group) > MOST_CURVES else [group]
                note = f" {len(kept)} of {len(parts)} such charts are drawn." * (1 < len(kept) < len(parts))
                for part in kept:
                    yield self._curves(self._titles[which], axis, part, note)

    def _curves(self, base: str, axis: str, group: Sequence[Curve], note: str) -> Chart:
        names = [curve.entry.case.implementation for curve in group]
        shapes = [(curve.entry.file.key, curve.others) for curve in group]
        lines, limits = [], dict[tuple[Point, ...], Line]()
        for curve, name, shape in zip(group, names, shapes, strict=True):
            points = [_point(x, entry.case) for x, entry in curve.points]
            look = self._colours[name], _nth(MARKERS, shapes, shape), _nth(DASHES, names, name)
            lines.append(Line(curve.name, *look, points))
            floors = tuple(Point(x, e.case.roofline.floor_ms) for x, e in curve.points if e.case.latency_ms)
            if all(point.value for point in floors):
                limits[floors] = Line(f"{curve.entry.file.key} limit".strip(), "ink", "", ":", floors)
        labels = AXES[axis], "latency, ms"
        draw = figures.curves(lines, list(limits.values()) * (len(limits) <= MOST_LIMITS), labels)
        word, others = "history" if axis == "kv" else axis, {curve.others for curve in group}
        title = f"by {word}" if base == word else f"{base}, by {word}"
        title += f", {others.pop()}" if len(others) == 1 and any(others) else ""
        finding = _sentence(list(map(_of_line, lines)), "lines") + note
        members = [entry for curve in group for _, entry in curve.points]
        return _chart("latency", title, members, finding, draw)

    def scenarios(self) -> Iterator[Chart]:
        """Yield bars of the latency of the cases that are on no curve, by workload."""
        for which, members in bars(self.entries).items():
            part = members[:MOST_ROWS]
            rows = [self._bar(entry, len({other.case.scenario for other in part}) > 1) for entry in part]
            finding = _of_bars(part, rows, len(members) - len(part))
            draw = figures.bars(rows)
            yield _chart("latency", self._titles[which], part, finding, draw)

    def _bar(self, entry: Entry, several: bool) -> Row:
        case, latency = entry.case, entry.case.latency_ms
        name, near = f"{entry.name}, {case.scenario}" if several else entry.name, case.roofline
        look = self._colours[case.implementation], near.floor_ms or None, case.check.status, bool(near.doubt)
        if latency is None:
            return Row(name, None, None, f"{status(case)}: no number", *look)
        return Row(name, latency.median, latency.ci95, estimated(latency), *look)

    def roofline(self) -> Iterator[Chart]:
        """Yield the roofline of every file with numbers: cases that did work, nearest to a limit first."""
        for file in self.files:
            timed = [entry for entry in self.entries if entry.file is file and entry.case.latency_ms]
            worked = [entry for entry in timed if min(_work(entry.case)) > 0]
            if worked:
                worked.sort(key=lambda entry: -(entry.case.roofline.fraction or 0))
                yield self._roofline(file, worked, roofs_of(file))

    def _roofline(self, file: ResultFile, entries: Sequence[Entry], roofs: Sequence[Ceiling]) -> Chart:
        cases, lines = [entry.case for entry in entries], []
        bases = sorted({case.base for case in cases})
        for case in cases:
            intensity, rate = _work(case)
            point = Point(intensity, rate, doubt=bool(case.roofline.doubt))
            look = self._colours[case.implementation], _nth(MARKERS, bases, case.base), ""
            lines.append(Line(f"{case_name(case)}: {limit(case.roofline)}", *look, [point]))
        legend = lines
        if len(lines) > MOST_NAMED:
            names = dict.fromkeys(case.implementation for case in cases)
            legend = [Line(name, self._colours[name], "s") for name in names]
            legend += [Line(base, "ink", _nth(MARKERS, bases, base)) for base in bases]
        finding = _sentence([f"{case_name(case)}, {verdict.near(case)}" for case in cases], "cases")
        finding += " This file has no limits: the roof is left out." * (not roofs)
        limits = _roof_lines(roofs, [line.points[0].x for line in lines])
        labels = "arithmetic intensity, FLOP per byte", "TFLOP/s"
        draw = figures.curves(lines, limits, labels, legend=legend, ticks=False)
        return _chart("", f"Roofline {file.key}".strip(), entries, finding, draw)


def _chart(kind: str, title: str, drawn: Sequence[Entry], finding: str, draw: Draw) -> Chart:
    subject = "; ".join(dict.fromkeys(f"{entry.file.about}, {entry.case.dtype}" for entry in drawn))
    slug = re.sub(r"[^a-z0-9]+", "-", f"{title} {kind}".lower()).strip("-")[:60].rstrip("-") or "picture"
    words = f"{kind.title()}: {title}".removeprefix(": "), subject, finding
    title, subject, finding = map(shortened, words, LETTERS)
    return Chart(slug, title, subject, finding, draw)


def _nth(looks: Sequence[T], keys: Sequence[object], key: object) -> T:
    """Return the look of a key among all keys, by first appearance."""
    distinct = [other for place, other in enumerate(keys) if other not in keys[:place]]
    return looks[distinct.index(key) % len(looks)]


def _point(x: float, case: Case) -> Point:
    value, bounds = (case.latency_ms.median, case.latency_ms.ci95) if case.latency_ms else (None, None)
    return Point(x, value, bounds, case.check.status, bool(case.roofline.doubt))


def _roof_lines(roofs: Sequence[Ceiling], intensities: Sequence[float]) -> list[Line]:
    """Return every roof, bent where it meets the highest one of the other kind."""
    steep = max((roof.value for roof in roofs if roof.work == "read"), default=math.inf)
    flat = max((roof.value for roof in roofs if roof.work == "matmul"), default=math.inf)
    shown = [*intensities, *[flat / steep] * math.isfinite(flat + steep)]
    lines = []
    for roof in roofs:
        is_flat, of = roof.work == "matmul", roof.dtype or size(roof.footprint_bytes or None, unknown="")
        rate, top = (steep, roof.value) if is_flat else (roof.value, flat)
        ends = {min(shown) / 4, max(shown) * 4, *[top / rate] * math.isfinite(rate + top)}
        points = [Point(x, min(x * rate, top) / 1e12) for x in sorted(ends)]
        dash = _nth(DASHES, [other for other in roofs if other.work == roof.work], roof)
        name = f"limit {ceilings.rate(roof)}{f' ({of})' * bool(of)}"
        lines.append(Line(name, "ink" if is_flat else "soft", "", dash, points))
    return lines


def _work(case: Case) -> tuple[float, float]:
    """Return the FLOPs of a forward per byte, and in 1e12 per second; zeros if they are not known."""
    cost, latency = device_cost(case), case.latency_ms
    if not cost or not latency or not cost.bytes:
        return 0.0, 0.0
    return cost.flops / cost.bytes, cost.flops / latency.median / 1e9


def _sentence(told: Sequence[str], what: str, every: int = 0) -> str:
    """Return what is drawn as a sentence: a few of many, how many more there are, and of how many in all."""
    more = [f"and {len(told) - MOST_TOLD} more {what}"] * (len(told) > MOST_TOLD)
    cut = f" The first {len(told)} of {every} are drawn." * (len(told) < every)
    return "; ".join([*told[:MOST_TOLD], *more]) + "." + cut


def _of_bars(entries: Sequence[Entry], rows: Sequence[Row], undrawn: int) -> str:
    """Return the verdicts of the report, the limit, what has no number, and every bar."""
    groups = grouped(entries, lambda entry: (entry.file.key, entry.case.scenario))
    lead = []
    for (key, scenario), members in list(groups.items())[:MOST_VERDICTS]:
        cases = [case for case in members[0].file.run.cases if case.scenario == scenario]
        lead.append(f"{key} {verdict.of_scenario(scenario, cases).text}.".strip())
    drawn = sorted((row for row in rows if row.value is not None), key=lambda row: row.value or 0.0)
    shared = figures.is_shared(rows)
    lead += [f"The limit is {number(drawn[0].mark)} ms."] * shared
    lead += [f"{row.name} has no number: {row.text.partition(':')[0]}." for row in rows if row.value is None]
    limits = [f" (limit {number(row.mark)})" * bool(row.mark and not shared) for row in drawn]
    told = [f"{row.name} {row.text} ms{limit}" for row, limit in zip(drawn, limits, strict=True)]
    return " ".join([*lead, _sentence(told, "bars", len(told) + undrawn)])


def _of_line(line: Line) -> str:
    """Return where a line begins and ends."""
    told = [point for point in line.points if point.value is not None]
    lost = f", no number at {len(line.points) - len(told)} places" * (len(told) < len(line.points))
    first_and_last = told[:: len(told) - 1 or 1]
    ends = [f"{known(point.value, point.bounds)} ms at {point.x:g}" for point in first_and_last]
    return f"{line.name}: {' to '.join(ends)}{lost}"
