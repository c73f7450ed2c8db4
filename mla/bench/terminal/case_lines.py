"""What is said of one case below the table, beside its further timings. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator

from mla.bench.results.passes import as_planned
from mla.bench.results.schema import Case, NewLengths, Run
from mla.bench.terminal.digits import known, number

# A mean of passes this far from the median of forwards is explained: both are printed, side by side.
APART = 0.05
# A forward on new lengths that takes this many times as long as on repeated ones is warned about.
COSTLY = 1.2


def case_lines(run: Run) -> list[str]:
    """Return lines about passes, planning, new lengths, and how throughput and latency of a case relate."""
    return [
        f"{case.scenario}, {case.implementation}: {text}"
        for case in run.cases
        for text in (*_passes(case), *_planning(case), *_new_lengths(case), *_mean(case))
    ]


def _passes(case: Case) -> Iterator[str]:
    """Say what was timed where the workload asks for more; of a decode pass, it was the first steps."""
    planned = case.planned
    if as_planned(case) or planned is None or case.latency_ms is None:
        return
    steps, fewer = case.steps_per_pass, case.steps_per_pass < planned.steps
    of = f"{'the first ' * (fewer and case.mode == 'decode')}{steps}"
    shared = "; ratios to it are of the same steps" if fewer and case.mode == "decode" else ""
    few = ", too few for an interval" * (case.passes < planned.passes and case.latency_ms.ci95 is None)
    passes = f"{case.passes} pass{'es' * (case.passes != 1)}"
    yield f"timed in {passes} of {of} instead of {planned.passes} of {planned.steps}{few}{shared}"


def _planning(case: Case) -> Iterator[str]:
    """In prefill, and for one op, planning is outside of the latency."""
    if case.latency_ms is not None and case.plan_ms is not None:
        of = f"planning {number(case.plan_ms)} ms"
        yield f"{of} a batch, not in the latency of {_latency(case)} ms"


def _new_lengths(case: Case) -> Iterator[str]:
    found = case.new_lengths
    if found is not None:
        yield (
            f"lengths never seen before: {number(found.ms)} ms a forward (planning {number(found.plan_ms)}), "
            f"repeated {number(found.repeated_ms)} ({number(found.repeated_plan_ms)})"
        )
    elif case.spread is not None and (case.spread.predicted or "dcp" in case.spread.layout):
        yield f"lengths never seen before were not tried with {case.spread.layout}"


def _mean(case: Case) -> Iterator[str]:
    """Say where tok/s is from if it does not follow from the latency beside it."""
    if case.latency_ms is None or case.tokens_per_s is None:
        return
    mean = 1e3 * sum(case.query_lens) / case.tokens_per_s.median
    if abs(mean / case.latency_ms.median - 1) > APART:
        yield (
            f"a forward takes {number(mean)} ms on average and {_latency(case)} ms in the median: tok/s "
            "follows from the average"
        )


def _latency(case: Case) -> str:
    return known(case.latency_ms.median, case.latency_ms.ci95) if case.latency_ms else "-"


def new_lengths_warning(case: Case) -> str | None:
    """Return a warning where repeated lengths are so much faster that a server does not see the headline."""
    found, latency = case.new_lengths, case.latency_ms
    if found is None or latency is None or found.ms <= COSTLY * found.repeated_ms:
        return None
    if found.ms - found.repeated_ms <= _noise(found, latency.p90 - latency.p10):
        return None
    return (
        f"new lengths: {case.scenario}, {case.implementation}: a forward on lengths never seen before takes "
        f"{number(found.ms / found.repeated_ms)} times as long as on repeated ones, which a server does not "
        "have; the headline is of repeated ones"
    )


def _noise(found: NewLengths, spread: float) -> float:
    """Return the gap between two medians of so many forwards that chance alone may make, at 3 deviations.

    `spread` is from p10 to p90, 2.56 standard deviations of a normal distribution; the standard error of a
    median of n is 1.25 deviations over the root of n.
    """
    return 3 * math.sqrt(2) * 1.25 * spread / 2.56 / math.sqrt(found.forwards)
