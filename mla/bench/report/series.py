"""Select the data of each panel from the runs. Pure: no drawing, no HTML, no file access."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from mla.bench.report.names import config_names, short_names
from mla.bench.results import compare
from mla.bench.results.compare import Comparison
from mla.bench.results.schema import Case, Interval, Latency, Run, Throughput
from mla.bench.terminal.digits import known
from mla.bench.terminal.verdict import is_yardstick

# Axes of a grid that get curves, and what they count.
AXES = {"kv": "history (tokens per request)", "batch": "batch (requests)"}

T = TypeVar("T")
K = TypeVar("K")


@dataclass(frozen=True)
class ResultFile:
    """One result file. `key` is the letter that stands for it in panels; empty for a single file.

    `name` and `config` are as short as tells them from those of the other files; `config` is "" if the file
    does not name it.
    """

    key: str
    name: str
    run: Run
    config: str = ""

    @property
    def label(self) -> str:
        """Letter and device."""
        return f"{self.key} {self.run.backend.device}".strip()

    @property
    def title(self) -> str:
        """Letter and name."""
        return f"{self.key} {self.name}".strip()


@dataclass(frozen=True)
class ReportEntry:
    """One case and the file it is from."""

    file: ResultFile
    case: Case

    @property
    def name(self) -> str:
        """Short name in a panel of one workload, such as "A mla"."""
        return f"{self.file.key} {self.case.implementation}".strip()


class Measure(NamedTuple):
    """A median and its interval, if there is one."""

    value: float
    low: float | None
    high: float | None

    @property
    def interval(self) -> Interval | None:
        """Both ends of the interval; None without one."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    def __str__(self) -> str:
        """Return the value with the digits that its interval supports, as everywhere else."""
        return known(self.value, self.interval)


class Quantity(NamedTuple):
    """What a bar, or the y axis of a curve, shows."""

    name: str
    unit: str
    of: Callable[[Case], Measure | None]
    limit: Callable[[Case], float | None]
    higher_is_better: bool


def _latency(case: Case) -> Measure | None:
    return _measure(case.latency_ms)


def _throughput(case: Case) -> Measure | None:
    return _measure(case.tokens_per_s)


def _measure(estimate: Latency | Throughput | None) -> Measure | None:
    if estimate is None or estimate.median <= 0:
        return None
    return Measure(estimate.median, *(estimate.ci95 or (None, None)))


def _floor(case: Case) -> float | None:
    return case.roofline.floor_ms or None


LATENCY = Quantity("latency", "ms", _latency, _floor, False)
THROUGHPUT = Quantity("throughput", "tok/s", _throughput, lambda _: None, True)
# Limits that differ by less are one line.
SAME_LIMIT = 0.01


def shared_limit(cases: Iterable[ReportEntry], quantity: Quantity) -> float | None:
    """Return the limit that every case with a number has; None if one has another, or none that is known."""
    limits = [quantity.limit(entry.case) for entry in cases if quantity.of(entry.case)]
    known_limits = [one for one in limits if one]
    if not limits or len(known_limits) < len(limits):
        return None
    return limits[0] if max(known_limits) <= (1 + SAME_LIMIT) * min(known_limits) else None


def result_files(paths: Sequence[str], runs: Sequence[Run]) -> list[ResultFile]:
    """Return the files with their letters: A, B, ... if there are several."""
    given = [str(run.config.get("name") or "") for run in runs]
    names, configs = short_names(paths), config_names(filter(None, given))
    keys = [_letters(index) if len(runs) > 1 else "" for index in range(len(runs))]
    return [
        ResultFile(key, names[path], run, configs.get(config, ""))
        for key, path, run, config in zip(keys, paths, runs, given, strict=True)
    ]


def _letters(index: int) -> str:
    return (_letters(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)


def entries(files: Iterable[ResultFile]) -> list[ReportEntry]:
    """Return every case of every file."""
    return [ReportEntry(file, case) for file in files for case in file.run.cases]


def with_numbers(cases: Iterable[ReportEntry]) -> list[ReportEntry]:
    """Return the cases that can be drawn: one that is wrong or was not run has no number."""
    return [entry for entry in cases if _latency(entry.case) is not None]


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Group in order of first appearance."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


class Workload(NamedTuple):
    """What cases must have in common to appear in one panel."""

    base: str
    op: str
    config: str
    dtype: str


def workload(entry: ReportEntry) -> Workload:
    """Return a case's workload; a dtype that is an axis of the grid does not split it."""
    case = entry.case
    dtype = "" if "dtype" in case.point else case.dtype
    return Workload(case.base, case.op or "", entry.file.config, dtype)


def titles(workloads: Iterable[Workload]) -> dict[Workload, str]:
    """Name each workload by its base scenario and by any other field in which they differ."""
    distinct = list(dict.fromkeys(workloads))
    telling = [at for at in range(1, len(Workload._fields)) if len({each[at] for each in distinct}) > 1]
    return {each: ", ".join([each.base, *(each[at] for at in telling if each[at])]) for each in distinct}


@dataclass(frozen=True)
class Line:
    """Cases that differ only along the axis. `others` are the grid's other values, such as "batch 8"."""

    others: str
    points: list[tuple[float, ReportEntry]]
    absent: list[tuple[float, ReportEntry]] = field(default_factory=list)  # those without a number

    @property
    def entry(self) -> ReportEntry:
        """Any case of the line: all are of one file and implementation."""
        return self.points[0][1]

    @property
    def shape(self) -> str:
        """What the line's marker and dashes stand for: its file and the grid's other values."""
        file = self.entry.file
        return ", ".join(filter(None, (file.title if file.key else "", self.others)))


@dataclass(frozen=True)
class Curves:
    """Lines of one workload along one axis."""

    workload: Workload
    axis: str
    lines: list[Line]

    def label(self, line: Line) -> str:
        """Return what tells a line from the others; the implementation if it is the only one."""
        names = list(zip(*map(_names, self.lines), strict=True))
        told = [name for name, every in zip(_names(line), names, strict=True) if len(set(every)) > 1]
        return ", ".join(filter(None, told)) or line.entry.name


def _names(line: Line) -> tuple[str, str, str]:
    return line.entry.file.key, line.entry.case.implementation, line.others


def curves(cases: Sequence[ReportEntry], axis: str) -> list[Curves]:
    """Return the curves along `axis`, for workloads whose grid has at least two numeric values of it."""
    on_axis = [one for one in cases if not is_yardstick(one.case) and position(one.case, axis) is not None]
    result = []
    for which, members in grouped(on_axis, workload).items():
        if len({position(entry.case, axis) for entry in with_numbers(members)}) > 1:
            result.append(Curves(which, axis, _lines(members, axis)))
    return result


def position(case: Case, axis: str) -> float | None:
    """Return a case's place on an axis; None if its grid has no such axis or the value is not a number."""
    try:
        return float(case.point[axis])
    except (KeyError, ValueError):
        return None


def _lines(members: Sequence[ReportEntry], axis: str) -> list[Line]:
    def others(entry: ReportEntry) -> str:
        return ", ".join(f"{name} {value}" for name, value in entry.case.point.items() if name != axis)

    groups = grouped(members, lambda entry: (entry.file.key, entry.case.implementation, others(entry)))
    lines = []
    for (*_, rest), same in groups.items():
        places = sorted(((position(one.case, axis) or 0.0, one) for one in same), key=lambda pair: pair[0])
        points = [(x, one) for x, one in places if _latency(one.case)]
        lines.append(Line(rest, points, [(x, one) for x, one in places if not _latency(one.case)]))
    return [line for line in lines if line.points]


def bars(cases: Sequence[ReportEntry]) -> dict[Workload, list[ReportEntry]]:
    """Return the cases that are on no curve, by workload; workloads without any number are left out."""
    drawn = {group.workload for axis in AXES for group in curves(cases, axis)}

    def shown(entry: ReportEntry) -> bool:
        return workload(entry) in drawn and any(position(entry.case, axis) is not None for axis in AXES)

    groups = grouped((one for one in cases if not is_yardstick(one.case) and not shown(one)), workload)
    return {which: members for which, members in groups.items() if with_numbers(members)}


def comparisons(files: Sequence[ResultFile]) -> list[tuple[ResultFile, list[Comparison], list[str]]]:
    """Compare every other file with the first: cases and warnings."""
    base, *others = files
    return [(new, compare.compare(base.run, new.run), compare.warnings(base.run, new.run)) for new in others]


def spread(entry: ReportEntry) -> float:
    """Return p90 over p10 of a case; 1.0 without numbers."""
    latency = entry.case.latency_ms
    return latency.p90 / latency.p10 if latency and latency.p10 > 0 else 1.0


def thin(samples: Sequence[float], most: int) -> list[tuple[int, float]]:
    """Return at most `most` samples with their indices: the extremes of equal intervals, to keep spikes."""
    if len(samples) <= most:
        return list(enumerate(samples))
    stretches = max(1, most // 2)
    kept: set[int] = set()
    for k in range(stretches):
        places = range(k * len(samples) // stretches, (k + 1) * len(samples) // stretches)
        kept |= {min(places, key=samples.__getitem__), max(places, key=samples.__getitem__)}
    return [(index, samples[index]) for index in sorted(kept)]


def printable(text: Any, most: int = 0) -> str:
    """Return text on one line without control characters, cut to `most` characters if given."""
    line = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]+", " ", str(text)).strip()
    return line if not most or len(line) <= most else f"{line[: most - 1]}…"
