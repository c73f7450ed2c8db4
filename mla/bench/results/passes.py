"""Passes of a case: their statistics, how many there are, and steps that two cases share. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from mla.bench.results import stats
from mla.bench.results.schema import Case, Latency, Throughput


def latency(passes: Sequence[Sequence[float]]) -> Latency:
    """Return the statistics of the milliseconds of at least one pass."""
    samples = [sample for one in passes for sample in one]
    medians = [stats.median(one) for one in passes]
    return Latency(
        median=stats.median(samples),
        ci95=stats.median_interval(medians),
        p10=stats.percentile(samples, 10),
        p90=stats.percentile(samples, 90),
        samples=samples,
        drift=stats.drift(medians),
        outliers=stats.outliers(passes),
    )


def throughput(passes: Sequence[Sequence[float]], tokens: int) -> Throughput:
    """Return the statistics of the tokens per second of passes of forwards with so many new tokens."""
    rates = [1e3 * tokens * len(samples) / sum(samples) for samples in passes]
    return Throughput(median=stats.median(rates), ci95=stats.median_interval(rates))


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
    """Return two cases of one scenario with the numbers of the steps that both have.

    The cache grows in a decode pass, so its first steps, all that a slow yardstick runs, are the fastest.
    """
    steps = min(case.steps_per_pass, other.steps_per_pass)
    both = case.mode == other.mode == "decode" and case.latency_ms and other.latency_ms
    return (_first(case, steps), _first(other, steps)) if both else (case, other)


def _first(case: Case, steps: int) -> Case:
    if case.steps_per_pass == steps:
        return case
    passes = [samples[:steps] for samples in of(case)]
    if not all(map(sum, passes)) or not stats.median([one for samples in passes for one in samples]):
        return case  # a coarse clock that saw none of them
    rates = throughput(passes, sum(case.query_lens))
    return msgspec.structs.replace(case, latency_ms=latency(passes), tokens_per_s=rates, steps_per_pass=steps)
