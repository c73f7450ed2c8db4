"""What follows from a case's fields: its ways of timing, whether it is predicted, and the shares of ranks.

Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from mla.bench.results.schema import Agreement, Case, Cost, Run, Spread, Timing
from mla.bench.results.stats import median

# What every place says with a time that was not measured.
WORD = "predicted"
_MARK = f" ({WORD})"
# Short name -> (graph replayed, cache cold, device clock), in the order in which they are listed.
KINDS = {
    "cold": (False, True, False),
    "device": (False, False, True),
    "device_cold": (False, True, True),
    "graph": (True, False, False),
    "graph_cold": (True, True, False),
    "graph_device": (True, False, True),
    "graph_device_cold": (True, True, True),
}


def by_kind(case: Case) -> dict[str, Timing]:
    """Return short name -> timing, for the timings that the case has."""
    timings = {
        (timing.mode == "graph", timing.cache == "cold", timing.clock != case.clock): timing
        for timing in case.timings
    }
    return {name: timings[kind] for name, kind in KINDS.items() if kind in timings}


def is_predicted(case: Case) -> bool:
    """Return whether a case's times are a simulation's: no such ranks were there."""
    return case.spread is not None and case.spread.predicted


def labelled(run: Run) -> Run:
    """Return a run for readers: implementations whose times are predicted say so in their names."""
    if not any(map(is_predicted, run.cases)):
        return run
    names = {(case.scenario, case.implementation): label(case) for case in run.cases}

    def named(case: Case) -> Case:
        agreement = [_named(one, names.get((case.scenario, one.implementation))) for one in case.agreement]
        return msgspec.structs.replace(case, implementation=label(case), agreement=agreement)

    return msgspec.structs.replace(run, cases=list(map(named, run.cases)))


def label(case: Case) -> str:
    """Return a case's implementation, with the word if its times are predicted."""
    return unlabelled(case.implementation) + _MARK * is_predicted(case)


def unlabelled(implementation: str) -> str:
    """Return the implementation that a label is of."""
    return implementation.removesuffix(_MARK)


def _named(one: Agreement, name: str | None) -> Agreement:
    return one if name is None else msgspec.structs.replace(one, implementation=name)


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
