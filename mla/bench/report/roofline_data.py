"""The roofline of one file: its roofs, measured or reconstructed, and its cases under them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from mla.bench.report.series import Entry, Source, entries, with_numbers
from mla.bench.results.schema import Ceiling
from mla.text import size

#: Roofs nearer than this share are drawn as one, and so many of one kind at most.
NEAR, MOST = 0.10, 4


@dataclass(frozen=True)
class Roof:
    """A limit in bytes per second (memory) or FLOP per second (compute)."""

    bound: Literal["memory", "compute"]
    value: float
    source: str
    detail: str = ""  # what tells roofs of one kind apart: a footprint or a dtype


@dataclass(frozen=True)
class Dot:
    """A case under the roofs. Intensity in FLOP per byte, rate in FLOP per second."""

    entry: Entry
    intensity: float
    rate: float


@dataclass(frozen=True)
class Roofline:
    """Everything one picture shows."""

    source: Source
    roofs: list[Roof]
    dots: list[Dot]


def roofline(source: Source) -> Roofline:
    """Return roofs and cases of a file; roofs are its ceilings, else what the floors of its cases mean."""
    found = with_numbers(entries([source]))
    measured = [roof for ceiling in source.run.ceilings if (roof := _measured(ceiling)) is not None]
    derived = [roof for entry in found if (roof := _derived(entry)) is not None]
    roofs = []
    for bound in ("memory", "compute"):
        of_kind = [one for one in measured if one.bound == bound] or [
            one for one in derived if one.bound == bound
        ]
        roofs += _distinct(of_kind)
    return Roofline(source, roofs, [dot for entry in found if (dot := _dot(entry)) is not None])


def _measured(ceiling: Ceiling) -> Roof | None:
    if ceiling.value <= 0 or ceiling.work == "copy":  # a forward reads far more than it writes
        return None
    if ceiling.work == "matmul":
        return Roof("compute", ceiling.value, ceiling.source, ceiling.dtype or "")
    footprint = size(ceiling.footprint_bytes or None, unknown="", GiB=".3g", MiB=".3g")
    return Roof("memory", ceiling.value, ceiling.source, footprint)


def _derived(entry: Entry) -> Roof | None:
    """Work over its floor is the limit that the floor was computed from."""
    limit, cost = entry.case.roofline, entry.case.cost
    if not limit.floor_ms or limit.bound is None:
        return None
    work = cost.bytes if limit.bound == "memory" else cost.flops
    detail = entry.case.dtype if limit.bound == "compute" else ""
    return Roof(limit.bound, 1e3 * work / limit.floor_ms, limit.peak_source or "", detail) if work else None


def _distinct(roofs: Iterable[Roof]) -> list[Roof]:
    """Return the highest roof of every level, at most `MOST` of them."""
    kept: list[Roof] = []
    for roof in sorted(roofs, key=lambda one: -one.value):
        if all(_differ(roof, other) for other in kept):
            kept.append(roof)
    return kept if len(kept) <= MOST else [*kept[: MOST - 1], kept[-1]]


def _differ(one: Roof, other: Roof) -> bool:
    return one.value < other.value * (1 - NEAR)


def _dot(entry: Entry) -> Dot | None:
    cost, latency = entry.case.cost, entry.case.latency_ms
    if latency is None or cost.flops <= 0 or cost.bytes <= 0:
        return None
    return Dot(entry, cost.flops / cost.bytes, 1e3 * cost.flops / latency.median)


def ridge(roofs: Sequence[Roof]) -> float | None:
    """Return the intensity at which the highest roofs of both kinds meet."""
    highest = {kind: max((r.value for r in roofs if r.bound == kind), default=None) for kind in _KINDS}
    memory, compute = highest["memory"], highest["compute"]
    return compute / memory if memory and compute else None


_KINDS = ("memory", "compute")
