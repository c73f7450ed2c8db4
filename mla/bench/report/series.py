"""Select from runs what each picture shows. Pure: no drawing, no HTML, no files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from mla.bench.results import compare
from mla.bench.results.compare import Comparison
from mla.bench.results.schema import Case, Run

#: Axes of a grid that get curves, with what they count.
AXES = {"kv": "history (tokens per request)", "batch": "batch (requests)"}

T = TypeVar("T")
K = TypeVar("K")


@dataclass(frozen=True)
class Source:
    """One result file. `key` is the letter that stands for it in pictures, empty for a file alone."""

    key: str
    path: str
    run: Run
    lane: int  # tells apart files of one device and config, such as before and after

    @property
    def config(self) -> str:
        """Name of the config, "" where the file does not say."""
        return str(self.run.config.get("name") or "")

    @property
    def label(self) -> str:
        """Letter and device."""
        return f"{self.key} {self.run.backend.device}".strip()


@dataclass(frozen=True)
class Entry:
    """One case and the file that it is from."""

    source: Source
    case: Case

    @property
    def name(self) -> str:
        """Short name in a picture of one workload, such as "A mla"."""
        return f"{self.source.key} {self.case.implementation}".strip()

    @property
    def colour_key(self) -> tuple[str, int, str]:
        """What has a colour of its own: files of one device share theirs unless they repeat a config."""
        return (self.source.run.backend.device, self.source.lane, self.case.implementation)


class Measure(NamedTuple):
    """A median and its interval, where there is one."""

    value: float
    low: float | None
    high: float | None


class Quantity(NamedTuple):
    """What the y axis of a curve, or a bar, shows."""

    name: str
    unit: str
    of: Callable[[Case], Measure | None]


def _latency(case: Case) -> Measure | None:
    found = case.latency_ms
    if found is None or found.median <= 0:
        return None
    return Measure(found.median, *(found.ci95 or (None, None)))


def _throughput(case: Case) -> Measure | None:
    found = case.tokens_per_s
    if found is None or found.median <= 0:
        return None
    return Measure(found.median, *(found.ci95 or (None, None)))


LATENCY = Quantity("latency", "ms", _latency)
THROUGHPUT = Quantity("throughput", "tok/s", _throughput)


def sources(paths: Sequence[str], runs: Sequence[Run]) -> list[Source]:
    """Return the files under their letters: A, B, ... when there are several."""
    seen: dict[tuple[str, str], int] = {}
    found = []
    for index, (path, run) in enumerate(zip(paths, runs, strict=True)):
        same = (run.backend.device, str(run.config.get("name")))
        seen[same] = seen.get(same, -1) + 1
        found.append(Source(_letters(index) if len(runs) > 1 else "", path, run, seen[same]))
    return found


def _letters(index: int) -> str:
    return (_letters(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)


def entries(files: Iterable[Source]) -> list[Entry]:
    """Return every case of every file."""
    return [Entry(source, case) for source in files for case in source.run.cases]


def with_numbers(found: Iterable[Entry]) -> list[Entry]:
    """Return the cases that may be drawn: a wrong one, or one that was not run, has no number."""
    return [entry for entry in found if _latency(entry.case) is not None]


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Group in order of first appearance."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


class Workload(NamedTuple):
    """What must agree for times to stand in one picture."""

    base: str
    op: str
    config: str
    dtype: str


def workload(entry: Entry) -> Workload:
    """Return the picture that a case belongs to; a dtype that is an axis of the grid does not split it."""
    case = entry.case
    dtype = "" if "dtype" in case.point else case.dtype
    return Workload(case.base, case.op or "", entry.source.config, dtype)


def titles(workloads: Iterable[Workload]) -> dict[Workload, str]:
    """Name each workload by its base scenario and by whatever else tells them apart."""
    found = list(dict.fromkeys(workloads))
    telling = [place for place in range(1, len(Workload._fields)) if len({one[place] for one in found}) > 1]
    return {one: ", ".join([one.base, *(one[place] for place in telling if one[place])]) for one in found}


@dataclass(frozen=True)
class Line:
    """Cases that differ along the axis only. `others` are the grid's other values, such as "batch 8"."""

    others: str
    points: list[tuple[float, Entry]]

    @property
    def entry(self) -> Entry:
        """Any case of the line: all are of one file and implementation."""
        return self.points[0][1]


@dataclass(frozen=True)
class Curves:
    """Lines of one workload along one axis."""

    workload: Workload
    axis: str
    lines: list[Line]


def curves(found: Sequence[Entry], axis: str) -> list[Curves]:
    """Return the curves along `axis`: workloads whose grid has at least two numeric values of it."""
    on_axis = [entry for entry in with_numbers(found) if position(entry.case, axis) is not None]
    result = []
    for which, members in grouped(on_axis, workload).items():
        if len({position(entry.case, axis) for entry in members}) > 1:
            result.append(Curves(which, axis, _lines(members, axis)))
    return result


def position(case: Case, axis: str) -> float | None:
    """Return a case's place on an axis, None where its grid has none or the value is no number."""
    try:
        return float(case.point[axis])
    except (KeyError, ValueError):
        return None


def _lines(members: Sequence[Entry], axis: str) -> list[Line]:
    def others(entry: Entry) -> str:
        return ", ".join(f"{name} {value}" for name, value in entry.case.point.items() if name != axis)

    groups = grouped(members, lambda entry: (entry.source.path, entry.source.key, entry.name, others(entry)))
    lines = []
    for (*_, rest), same in groups.items():
        places = [(position(entry.case, axis) or 0.0, entry) for entry in same]
        lines.append(Line(rest, sorted(places, key=lambda pair: pair[0])))
    return lines


def bars(found: Sequence[Entry]) -> dict[Workload, list[Entry]]:
    """Return the cases that no curve shows, by workload."""
    drawn = {workload_curves.workload for axis in AXES for workload_curves in curves(found, axis)}

    def shown(entry: Entry) -> bool:
        return workload(entry) in drawn and any(position(entry.case, axis) is not None for axis in AXES)

    return grouped((entry for entry in with_numbers(found) if not shown(entry)), workload)


def comparisons(files: Sequence[Source]) -> list[tuple[Source, list[Comparison], list[str]]]:
    """Compare every further file with the first: cases and warnings."""
    base, *others = files
    return [(one, compare.compare(base.run, one.run), compare.warnings(base.run, one.run)) for one in others]


def spread(entry: Entry) -> float:
    """Return p90 over p10 of a case with numbers."""
    latency = entry.case.latency_ms
    return latency.p90 / latency.p10 if latency and latency.p10 > 0 else 1.0


def thin(samples: Sequence[float], most: int) -> list[tuple[int, float]]:
    """Return at most `most` samples with their indices: the extremes of equal stretches, to keep spikes."""
    if len(samples) <= most:
        return list(enumerate(samples))
    stretches = max(1, most // 2)
    kept: set[int] = set()
    for k in range(stretches):
        places = range(k * len(samples) // stretches, (k + 1) * len(samples) // stretches)
        kept |= {min(places, key=samples.__getitem__), max(places, key=samples.__getitem__)}
    return [(index, samples[index]) for index in sorted(kept)]


def passes(case: Case) -> list[list[float]]:
    """Return the samples of each pass."""
    samples: list[float] = case.latency_ms.samples if case.latency_ms else []
    steps = max(1, case.steps_per_pass)
    return [samples[start : start + steps] for start in range(0, len(samples), steps)]


def printable(text: Any, most: int = 0) -> str:
    """Return text on one line without control characters, cut to `most` characters if that is given."""
    line = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]+", " ", str(text)).strip()
    return line if not most or len(line) <= most else f"{line[: most - 1]}…"
