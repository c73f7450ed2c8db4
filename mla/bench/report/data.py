"""Select from runs what charts and tables show. Pure: no drawing, no HTML, no file access."""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from operator import itemgetter
from string import ascii_uppercase
from typing import NamedTuple

from mla.bench.results.schema import Case, Ceiling, Run
from mla.bench.terminal.verdict import is_yardstick
from mla.text import grouped
from mla_backends.outside import escaped

# What cases must have in common to appear in one chart: base scenario, op, config and dtype.
Workload = tuple[str, str, str, str]

# Axes of a grid that get curves, and what they count.
AXES = {
    "kv": "history (tokens per request)",
    "batch": "batch (requests)",
    "topk": "selected (tokens per query)",
}


@dataclass(frozen=True)
class ResultFile:
    """One result file. `key` is the letter that stands for it; empty for a single file.

    `name` and `config` are as short as tells them from those of the other files; `config` is "" if the file
    does not name it.
    """

    key: str
    name: str
    run: Run
    config: str = ""

    @property
    def title(self) -> str:
        """Letter and name."""
        return f"{self.key} {self.name}".strip()

    @property
    def about(self) -> str:
        """Letter, device and config."""
        return ", ".join(filter(None, (f"{self.key} {self.run.backend.device}".strip(), self.config)))


class Entry(NamedTuple):
    """One case and the file it is from."""

    file: ResultFile
    case: Case

    @property
    def name(self) -> str:
        """Name among the cases of one workload, such as "A mla"."""
        return f"{self.file.key} {self.case.implementation}".strip()


def result_files(paths: Sequence[str], runs: Sequence[Run]) -> list[ResultFile]:
    """Return the files with their letters if there are several: A to Z, A1, B1 and so on."""
    given = [str(run.config.get("name") or "") for run in runs]
    names, configs = short_names(paths), short_names(filter(None, given))
    keys = [f"{ascii_uppercase[at % 26]}{at // 26 or ''}" * (len(runs) > 1) for at in range(len(runs))]
    return [
        ResultFile(key, escaped(names[path]), run, configs.get(config, "").removesuffix(".json"))
        for key, path, run, config in zip(keys, paths, runs, given, strict=True)
    ]


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Return for every path its last part, and as many folders before it as tell it from the others."""
    parts = {path: re.split(r"[/\\]+", os.path.normpath(path)) for path in paths}
    names: dict[str, str] = {}
    for path, words in parts.items():
        rest = [other for other in parts.values() if other != words]
        lengths = (n for n in range(1, len(words)) if all(other[-n:] != words[-n:] for other in rest))
        names[path] = "/".join(words[-next(lengths, len(words)) :])
    return names


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

    others: str
    points: list[tuple[float, Entry]]

    @property
    def entry(self) -> Entry:
        """Any case of the curve: all are of one file and implementation."""
        return self.points[0][1]

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
            lines = [Curve(rest, sorted(same, key=itemgetter(0))) for (_, rest), same in groups.items()]
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


def roofs(file: ResultFile) -> list[Ceiling]:
    """Return the limits to draw: the highest and the lowest bandwidth, and the highest rate of each dtype."""
    known = sorted(file.run.ceilings, key=lambda roof: -roof.value)
    read, compute = ([roof for roof in known if roof.work == work] for work in ("read", "matmul"))
    highest = [of_dtype[0] for of_dtype in grouped(compute, lambda roof: roof.dtype).values()]
    return [*read[:1], *read[1:][-1:], *highest]
