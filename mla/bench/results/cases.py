"""What follows from a case's fields: its ways of timing, whether it is predicted, the shares of ranks,
and the statistics of its passes. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from mla.bench.results import stats
from mla.bench.results.schema import Case, Cost, Latency, Run, Spread, Throughput

# The fact of an environment that names baselines which nobody asked for: no exit code depends on them.
ADDED = "added_baselines"

# How the reason of a timing begins that nobody asked for, and for which no time was left.
LEFT_OUT = "left out: "
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


def by_kind(case: Case) -> dict[str, Latency]:
    """Return short name -> latency, for the ways in which the case was timed beside the headline."""
    latencies = {
        (timing.mode == "graph", timing.cache == "cold", timing.clock != case.clock): timing.latency_ms
        for timing in case.timings
    }
    return {name: latency for name, kind in KINDS.items() if (latency := latencies.get(kind))}


def added_baselines(run: Run) -> set[str]:
    """Return the implementations that joined a run though nobody asked for them."""
    return set(filter(None, run.environment.get(ADDED, "").split(",")))


def is_predicted(case: Case) -> bool:
    """Return whether a case's times are a simulation's: no such ranks were there."""
    return case.spread is not None and case.spread.predicted


def labelled(run: Run) -> Run:
    """Return a run for readers: implementations whose times are predicted say so in their names."""
    changed, cases = msgspec.structs.replace, list[Case]()
    for case in run.cases:
        mark = _MARK * is_predicted(case)  # and so are those that it agrees with
        others = [changed(other, implementation=other.implementation + mark) for other in case.agreement]
        cases.append(changed(case, implementation=label(case), agreement=others))
    return changed(run, cases=cases)


def label(case: Case) -> str:
    """Return a case's implementation, with the word if its times are predicted."""
    return unlabelled(case.implementation) + _MARK * is_predicted(case)


def unlabelled(implementation: str) -> str:
    """Return the implementation that a label is of."""
    return implementation.removesuffix(_MARK)


class Repeated(NamedTuple):
    """The shares of all ranks' work that one device would not do, from 0 to 1."""

    flops: float
    bytes: float


def busiest(costs: Sequence[Cost]) -> Cost:
    """Return the most that any device has of each kind of work: under one limit, its floor is the highest."""
    return Cost(flops=max(cost.flops for cost in costs), bytes=max(cost.bytes for cost in costs))


def device_cost(case: Case) -> Cost | None:
    """Return the work of a forward on one device: the busiest rank's; None if ranks do not say."""
    costs = _costs(case)
    return busiest(costs) if costs else None


def repeated(case: Case) -> Repeated | None:
    """Return what a layout has ranks repeat; None on one device, and if ranks do not say."""
    costs = _costs(case)
    if case.spread is None or not costs:
        return None
    shares = []
    for kind in Repeated._fields:
        needed, done = getattr(case.cost, kind), sum(getattr(cost, kind) for cost in costs)
        shares.append(max(0.0, 1 - needed / done) if done else 0.0)
    return Repeated(*shares)


def imbalances(spread: Spread) -> list[float]:
    """Return by rank how much longer it works than the median one, collectives left out; 0.1: by 10 %."""
    busy = [max(0.0, stats.median(rank.samples) - rank.collective_ms) for rank in spread.ranks]
    middle = stats.median(busy)
    return [time / middle - 1 if middle else 0.0 for time in busy]


def _costs(case: Case) -> list[Cost]:
    """Return the work of every device in a forward; nothing if a rank does not say."""
    if case.spread is None:
        return [case.cost]
    costs = [rank.cost for rank in case.spread.ranks if rank.cost is not None]
    return costs if len(costs) == len(case.spread.ranks) else []


# ---------------------------------------------------------------------------------------------------- passes

# Steps that two cases share from which the first one is left out of their ratio.
MIN_SHARED_STEPS = 3


def latency_of(passes: Sequence[Sequence[float]]) -> Latency:
    """Return the statistics of the milliseconds of at least one pass.

    The interval is that of the median pass, widened where the median of all samples lies outside.
    """
    samples = [sample for times in passes for sample in times]
    medians, median = [stats.median(times) for times in passes], stats.median(samples)
    return Latency(
        median=median,
        ci95=_holding(median, stats.median_interval(medians)),
        p10=stats.percentile(samples, 10),
        p90=stats.percentile(samples, 90),
        samples=samples,
        drift=stats.drift(medians),
        outliers=stats.outliers(passes),
    )


def throughput_of(passes: Sequence[Sequence[float]], tokens: int) -> Throughput:
    """Return the tokens per second of all passes of forwards with so many new tokens, over their total time.

    The interval is that of the median pass, widened where one slow pass takes the total out of it.
    """
    rates = [1e3 * tokens * len(samples) / sum(samples) for samples in passes]
    total = 1e3 * tokens * sum(map(len, passes)) / sum(map(sum, passes))
    return Throughput(median=total, ci95=_holding(total, stats.median_interval(rates)))


def _holding(value: float, interval: tuple[float, float] | None) -> tuple[float, float] | None:
    """Return an interval that holds its own value."""
    return interval and (min(value, interval[0]), max(value, interval[1]))


def passes_of(case: Case) -> list[list[float]]:
    """Return the samples of each pass."""
    samples: list[float] = case.latency_ms.samples if case.latency_ms else []
    steps = max(1, case.steps_per_pass)
    return [samples[start : start + steps] for start in range(0, len(samples), steps)]


def due(case: Case, planned: int) -> int:
    """Return the passes that make a case complete: of a slow yardstick fewer than the workload's."""
    return planned if case.planned is None else case.planned.due


def as_planned(case: Case) -> bool:
    """Return whether a case has no number, or as many passes as the workload asks for, of as many steps."""
    if case.latency_ms is None or case.planned is None:
        return True
    return (case.passes, case.steps_per_pass) == (case.planned.passes, case.planned.steps)


def same_steps(case: Case, other: Case) -> tuple[Case, Case, range | None]:
    """Return two cases of one scenario with the numbers of the steps they share, and these; None for all.

    The cache grows in a decode pass, so its first steps, all that a slow yardstick runs, are the fastest. The
    very first follows another implementation, whose weights are in the caches: in short passes that would
    weigh more against the faster one, so it is left out if that leaves two.
    """
    both = case.mode == other.mode == "decode" and case.latency_ms and other.latency_ms
    if not both or case.steps_per_pass == other.steps_per_pass:
        return case, other, None
    last = min(case.steps_per_pass, other.steps_per_pass)
    steps = range(int(last >= MIN_SHARED_STEPS), last)
    mine, theirs = _only(case, steps), _only(other, steps)
    return (mine, theirs, steps) if mine is not None and theirs is not None else (case, other, None)


def _only(case: Case, steps: range) -> Case | None:
    """Return a case with the numbers of some steps; None where a coarse clock saw none of them."""
    if len(steps) == case.steps_per_pass:
        return case
    passes = [samples[steps.start : steps.stop] for samples in passes_of(case)]
    if not all(map(sum, passes)) or not stats.median([sample for samples in passes for sample in samples]):
        return None
    latency, rate = latency_of(passes), throughput_of(passes, sum(case.query_lens))
    return msgspec.structs.replace(case, latency_ms=latency, tokens_per_s=rate, steps_per_pass=len(steps))
