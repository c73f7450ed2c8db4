"""Passes of a case: their statistics, how many there are, and steps that two cases share. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from mla.bench.results import stats
from mla.bench.results.schema import Case, Latency, Throughput

# Steps that two cases share from which the first one is left out of their ratio.
ENOUGH = 3


def latency(passes: Sequence[Sequence[float]]) -> Latency:
    """Return the statistics of the milliseconds of at least one pass.

    The interval is that of the median pass, widened where the median of all samples lies outside.
    """
    samples = [sample for one in passes for sample in one]
    medians, median = [stats.median(one) for one in passes], stats.median(samples)
    return Latency(
        median=median,
        ci95=_holding(median, stats.median_interval(medians)),
        p10=stats.percentile(samples, 10),
        p90=stats.percentile(samples, 90),
        samples=samples,
        drift=stats.drift(medians),
        outliers=stats.outliers(passes),
    )


def throughput(passes: Sequence[Sequence[float]], tokens: int) -> Throughput:
    """Return the tokens per second of all passes of forwards with so many new tokens, over their total time.

    The interval is that of the median pass, widened where one slow pass takes the total out of it.
    """
    rates = [1e3 * tokens * len(samples) / sum(samples) for samples in passes]
    total = 1e3 * tokens * sum(map(len, passes)) / sum(map(sum, passes))
    return Throughput(median=total, ci95=_holding(total, stats.median_interval(rates)))


def _holding(value: float, interval: tuple[float, float] | None) -> tuple[float, float] | None:
    """Return an interval that holds its own value."""
    return interval and (min(value, interval[0]), max(value, interval[1]))


def of(case: Case) -> list[list[float]]:
    """Return the samples of each pass."""
    samples: list[float] = case.latency_ms.samples if case.latency_ms else []
    steps = max(1, case.steps_per_pass)
    return [samples[start : start + steps] for start in range(0, len(samples), steps)]


def due(case: Case, planned: int) -> int:
    """Return the passes that make a case complete: of a slow yardstick fewer than the workload's."""
    return planned if case.planned is None else case.planned.due


def planned_steps(case: Case) -> int:
    """Return the workload's forwards of a pass, of which a slow yardstick runs fewer."""
    return case.steps_per_pass if case.planned is None else case.planned.steps


def as_planned(case: Case) -> bool:
    """Return whether a case has no number, or as many passes as the workload asks for, of as many steps."""
    if case.latency_ms is None or case.planned is None:
        return True
    return (case.passes, case.steps_per_pass) == (case.planned.passes, case.planned.steps)


def same_steps(case: Case, other: Case) -> tuple[Case, Case]:
    """Return two cases of one scenario, of which one ran fewer steps, with the numbers of `shared_steps`.

    The cache grows in a decode pass, so its first steps, all that a slow yardstick runs, are the fastest.
    """
    both = case.mode == other.mode == "decode" and case.latency_ms and other.latency_ms
    if not both or case.steps_per_pass == other.steps_per_pass:
        return case, other
    steps = shared_steps(case, other)
    mine, theirs = _only(case, steps), _only(other, steps)
    return (mine, theirs) if mine is not None and theirs is not None else (case, other)


def shared_steps(case: Case, other: Case) -> range:
    """Return the steps that two cases are compared by: those of both, without the first if that leaves two.

    The first step follows another implementation, whose weights are in the caches: in short passes that would
    weigh more against the faster one.
    """
    steps = min(case.steps_per_pass, other.steps_per_pass)
    return range(int(steps >= ENOUGH), steps)


def _only(case: Case, steps: range) -> Case | None:
    """Return a case with the numbers of some steps; None where a coarse clock saw none of them."""
    if len(steps) == case.steps_per_pass:
        return case
    passes = [samples[steps.start : steps.stop] for samples in of(case)]
    if not all(map(sum, passes)) or not stats.median([one for samples in passes for one in samples]):
        return None
    rates = throughput(passes, sum(case.query_lens))
    count = len(steps)
    return msgspec.structs.replace(case, latency_ms=latency(passes), tokens_per_s=rates, steps_per_pass=count)
