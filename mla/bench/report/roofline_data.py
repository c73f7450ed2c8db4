"""The roofline of one file: its roofs, measured or derived, and its cases under them. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mla.bench.report.series import ReportEntry, ResultFile, entries, with_numbers
from mla.bench.results.cases import device_cost
from mla.bench.results.schema import Ceiling
from mla.bench.terminal.verdict import is_yardstick
from mla.text import size

Kind = Literal["memory", "compute"]
# Roofs within this share of each other are drawn as one; at most so many of a kind are drawn.
NEAR = 0.10
MOST: dict[Kind, int] = {"memory": 2, "compute": 4}


@dataclass(frozen=True)
class Roof:
    """A limit in bytes per second (memory) or FLOP per second (compute)."""

    bound: Kind
    value: float
    source: str
    detail: str = ""  # distinguishes roofs of one kind: a footprint or a dtype
    lowest: float | None = None  # of repeated measurements
    ours: bool = False  # our own op is the best known way


@dataclass(frozen=True)
class Dot:
    """A case under the roofs. Intensity in FLOP per byte, rate in FLOP per second."""

    entry: ReportEntry
    intensity: float
    rate: float


@dataclass(frozen=True)
class RooflineData:
    """What the roofline of one file shows: all its roofs in the table, and those that are drawn."""

    file: ResultFile
    roofs: list[Roof]
    drawn: list[Roof]
    dots: list[Dot]


def roofline(file: ResultFile) -> RooflineData:
    """Return roofs and cases of a file; its measured ceilings, else the limits its cases' floors imply."""
    cases = with_numbers(entries([file]))
    measured = [roof for ceiling in file.run.ceilings if (roof := _measured(ceiling)) is not None]
    derived = [roof for entry in cases if (roof := _derived(entry)) is not None]
    roofs: list[Roof] = []
    drawn: list[Roof] = []
    for bound in MOST:
        of_kind = [roof for roof in measured if roof.bound == bound] or _unique(
            roof for roof in derived if roof.bound == bound
        )
        roofs += sorted(of_kind, key=lambda roof: -roof.value)
        drawn += _distinct(of_kind, MOST[bound])
    return RooflineData(file, roofs, drawn, [dot for entry in cases if (dot := _dot(entry)) is not None])


def _measured(ceiling: Ceiling) -> Roof | None:
    if ceiling.value <= 0 or ceiling.work == "copy":  # a forward reads far more than it writes
        return None
    if ceiling.work == "matmul":
        return Roof(
            "compute", ceiling.value, ceiling.source, ceiling.dtype or "", ceiling.lowest, ceiling.ours
        )
    footprint = size(ceiling.footprint_bytes or None, unknown="", GiB=".3g", MiB=".3g")
    return Roof("memory", ceiling.value, ceiling.source, footprint, ceiling.lowest, ceiling.ours)


def _derived(entry: ReportEntry) -> Roof | None:
    """Return the limit that a case's floor was computed from: its work over the floor."""
    limit, cost = entry.case.roofline, device_cost(entry.case)
    if not limit.floor_ms or limit.bound is None or cost is None:
        return None
    work = cost.bytes if limit.bound == "memory" else cost.flops
    detail = entry.case.dtype if limit.bound == "compute" else ""
    return Roof(limit.bound, 1e3 * work / limit.floor_ms, limit.peak_source or "", detail) if work else None


def _unique(roofs: Iterable[Roof]) -> list[Roof]:
    """Return each roof once, although many cases imply it, each with an error of rounding."""
    return list({(f"{roof.value:.6g}", roof.source, roof.detail): roof for roof in roofs}.values())


def _distinct(roofs: Iterable[Roof], most: int) -> list[Roof]:
    """Return the highest of each cluster of near-equal roofs, at most so many of them.

    One that stands for several dtypes has the names of all. Footprints that are near are one size of memory.
    """
    clusters: list[list[Roof]] = []
    for roof in sorted(roofs, key=lambda roof: -roof.value):
        if clusters and roof.value >= clusters[-1][0].value * (1 - NEAR):
            clusters[-1].append(roof)
        else:
            clusters.append([roof])
    kept = clusters if len(clusters) <= most else [*clusters[: most - 1], clusters[-1]]
    return [_joined(cluster) if cluster[0].bound == "compute" else cluster[0] for cluster in kept]


def _joined(cluster: Sequence[Roof]) -> Roof:
    names = dict.fromkeys(roof.detail for roof in cluster if roof.detail)
    return replace(cluster[0], detail=", ".join(names))


def _dot(entry: ReportEntry) -> Dot | None:
    cost, latency = device_cost(entry.case), entry.case.latency_ms
    if latency is None or cost is None or is_yardstick(entry.case) or cost.flops <= 0 or cost.bytes <= 0:
        return None
    rate = 1e3 * cost.flops / latency.median
    return Dot(entry, cost.flops / cost.bytes, rate) if math.isfinite(rate) else None


def ridge(roofs: Sequence[Roof]) -> float | None:
    """Return the intensity at which the highest roofs of both kinds meet; None without both."""
    highest = {kind: max((r.value for r in roofs if r.bound == kind), default=None) for kind in MOST}
    memory, compute = highest["memory"], highest["compute"]
    return compute / memory if memory and compute else None
