"""Strong scaling: how much faster one scenario is on several ranks than on one device. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mla.bench.results import compare
from mla.bench.results.cases import WORD, is_predicted, repeated, unlabelled
from mla.bench.results.compare import Comparison, compare_cases
from mla.bench.results.schema import Case, Interval, Run
from mla.bench.results.stats import median

ONE = "one device"


@dataclass(frozen=True)
class Resources:
    """What a case ran on: that many ranks, and threads of each where the device is the host's processor."""

    ranks: int
    threads: int | None

    @property
    def units(self) -> int:
        """Number of cores, or of devices."""
        return self.ranks * (self.threads or 1)

    def __str__(self) -> str:
        if self.threads is None:
            return f"{self.ranks} device{'s' * (self.ranks > 1)}"
        return f"{self.ranks} x {self.threads} thread{'s' * (self.threads > 1)}"


@dataclass(frozen=True)
class Scaled:
    """A case compared with the base, whose own `speedup` is 1 and has no interval.

    `efficiency` is the speedup over the cores or devices that it took; None where those are not of one kind,
    or not the same: then the speedup holds what lies between the devices as well.
    """

    run: int  # place of its run among those given
    case: Case
    device: str
    resources: Resources
    comparison: Comparison | None  # None: this is the base
    ideal: float | None  # the speedup of efficiency 1

    @property
    def speedup(self) -> float:
        """How many times as fast the case is as the base; 1 if that cannot be told."""
        return (self.comparison and self.comparison.speedup) or 1.0

    @property
    def interval(self) -> Interval | None:
        """The interval of the speedup, with at least 90 % confidence."""
        return self.comparison.speedup_interval if self.comparison else None

    @property
    def layout(self) -> str:
        """The layout, and whether the time is predicted."""
        layout = self.case.spread.layout if self.case.spread else ONE
        return layout + f" ({WORD})" * is_predicted(self.case)

    @property
    def efficiency(self) -> float | None:
        """The share of the ideal speedup."""
        return self.speedup / self.ideal if self.ideal else None

    @property
    def collective_ms(self) -> float | None:
        """Time in collectives of the median rank."""
        spread = self.case.spread
        return median([one.collective_ms for one in spread.ranks]) if spread else None

    @property
    def repeated(self) -> float | None:
        """The share of all ranks' work that one device would not do, of what bounds the case."""
        found = repeated(self.case)
        return found.of(self.case.roofline.bound) if found else None


@dataclass(frozen=True)
class Scaling:
    """One scenario and implementation: on one device, and on ranks."""

    scenario: str
    implementation: str
    base: Resources
    rows: list[Scaled]  # the base first

    def remark(self) -> str:
        """Say that rows ran on other devices than the base; "" if none did."""
        own = self.rows[0].device
        others = list(dict.fromkeys(row.device for row in self.rows if row.device != own))
        return f"no efficiency on {', '.join(others)}: the base ran on {own}" if others else ""


def scaling(runs: Sequence[Run]) -> list[Scaling]:
    """Return every case that is there both on one device and over ranks, of the same work and dtype.

    Of several on one device, the base is that with the fewest threads, and the others are rows.
    """
    groups: dict[tuple[object, ...], list[tuple[int, Case]]] = {}
    for place, run in enumerate(runs):
        for case in run.cases:
            if case.latency_ms is not None:
                groups.setdefault((*compare.key(case), case.dtype), []).append((place, case))
    return [found for members in groups.values() if (found := _scaling(runs, members)) is not None]


def _scaling(runs: Sequence[Run], members: Sequence[tuple[int, Case]]) -> Scaling | None:
    alone = [(place, case) for place, case in members if case.spread is None]
    if not alone:
        return None
    place, base = min(alone, key=lambda one: _resources(runs[one[0]], one[1]).units)
    rows = [
        _scaled(number, case, (runs[place], base), runs[number])
        for number, case in members
        if case is base or not compare.other_work(runs[place], base, runs[number], case)
    ]
    rows.sort(key=lambda row: (row.case is not base, row.case.spread is not None, row.resources.units))
    if not any(row.case.spread for row in rows):
        return None
    return Scaling(base.scenario, unlabelled(base.implementation), rows[0].resources, rows)


def _scaled(place: int, case: Case, base: tuple[Run, Case], run: Run) -> Scaled:
    before, after = _resources(*base), _resources(run, case)
    device = run.backend.device
    alike = device == base[0].backend.device and (before.threads is None) == (after.threads is None)
    ideal = after.units / before.units if alike else None
    comparison = None if case is base[1] else compare_cases(base[1], case)
    return Scaled(place, case, device, after, comparison, ideal)


def _resources(run: Run, case: Case) -> Resources:
    """Return what a case ran on; threads count only where they are the device."""
    threads = run.environment.get("torch_threads", "")
    on_host = run.backend.device == run.environment.get("processor")
    ranks = len(case.spread.ranks) if case.spread else 1
    counted = re.fullmatch("[1-9][0-9]{0,5}", threads) if on_host else None  # not thousands of digits
    return Resources(ranks, int(threads) if counted else None)
