"""What one device has of a case's work, and how evenly ranks have it. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mla.bench.results.schema import Case, Cost, Spread
from mla.bench.results.stats import median


class Repeated(NamedTuple):
    """The shares of all ranks' work that one device would not do, from 0 to 1."""

    flops: float
    bytes: float

    def of(self, bound: str | None) -> float:
        """Return the share of what bounds the case; the larger one where that is not known."""
        return {"memory": self.bytes, "compute": self.flops}.get(bound or "", max(self))


def busiest(costs: Sequence[Cost]) -> Cost:
    """Return the most that any device has of each kind of work: under one limit, its floor is the highest."""
    return Cost(flops=max(one.flops for one in costs), bytes=max(one.bytes for one in costs))


def device_cost(case: Case) -> Cost | None:
    """Return the work of a forward on one device: the busiest rank's; None if ranks do not say."""
    if case.spread is None:
        return case.cost
    costs = _costs(case.spread)
    return busiest(costs) if costs else None


def repeated(case: Case) -> Repeated | None:
    """Return what a layout has ranks repeat; None on one device, and if ranks do not say."""
    costs = _costs(case.spread) if case.spread else []
    if not costs:
        return None
    return Repeated(
        _excess(case.cost.flops, sum(one.flops for one in costs)),
        _excess(case.cost.bytes, sum(one.bytes for one in costs)),
    )


def imbalances(spread: Spread) -> list[float]:
    """Return by rank how much longer it works than the median one, collectives left out; 0.1: by 10 %."""
    busy = [max(0.0, median(one.samples) - one.collective_ms) for one in spread.ranks]
    middle = median(busy)
    return [one / middle - 1 if middle else 0.0 for one in busy]


def imbalance(spread: Spread) -> float:
    """Return how much longer the busiest rank works than the median one, collectives left out."""
    return max(imbalances(spread))


def _costs(spread: Spread) -> list[Cost]:
    """Return the work of every rank; none if one does not say."""
    costs = [one.cost for one in spread.ranks if one.cost is not None]
    return costs if len(costs) == len(spread.ranks) else []


def _excess(needed: int, done: int) -> float:
    return max(0.0, 1 - needed / done) if done else 0.0
