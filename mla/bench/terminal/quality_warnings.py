"""Warnings about a run's numbers: one sentence each. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator

from mla.bench.results.schema import Case, Latency, Run
from mla.bench.terminal.case_lines import new_lengths_warning
from mla.bench.terminal.digits import number

# p90 over p10 above which a case is called noisy; a growing cache alone gives about 1.1.
NOISY = 1.5
# Relative change over all passes above which a case is said to drift.
DRIFTS = 0.05
# Share of outliers, and multiple of the median taken by the slowest, above which they are mentioned.
MANY, LONG = 0.01, 10.0


def quality_warnings(run: Run) -> list[str]:
    """Return a sentence for everything that makes the numbers of a run doubtful or incomplete."""
    return [warning for case in run.cases for warning in of_case(case)]


def of_case(case: Case) -> Iterator[str]:
    """Yield the warnings about one case; each starts with its kind and a colon, such as "noisy: "."""
    where = f"{case.scenario}, {case.implementation}"
    if case.settled is False and case.check.status != "wrong":
        yield (
            f"not settled: {where}: latencies still changed after {case.warmups} warm-up forwards; "
            "raise --warmups, or run again on a quieter machine"
        )
    if case.latency_ms is not None:
        yield from _of_latency(where, case.latency_ms)
    if case.roofline.doubt:
        yield f"above 100 % of its limit: {where}: {case.roofline.doubt}"
    if costly := new_lengths_warning(case):
        yield costly
    for reason, ways in _skipped(case).items():
        yield f"skipped: {', '.join(ways)} of {where}: {reason}"


def _of_latency(where: str, latency: Latency) -> Iterator[str]:
    if latency.p90 > NOISY * latency.p10:
        spread = f"{number(latency.p90 / latency.p10)} times p10" if latency.p10 else "finite and p10 is 0"
        yield f"noisy: {where}: p90 is {spread}; see its samples, or run again on a quieter machine"
    if latency.drift is not None and abs(latency.drift) > DRIFTS:
        change = "slower" if latency.drift > 0 else "faster"
        yield (
            f"drifts: {where}: became {100 * abs(latency.drift):.0f}% {change} over its passes; the device's "
            "clock or temperature, or another load, changed"
        )
    longest = max(latency.samples) / latency.median
    count = latency.outliers or 0
    if count > MANY * len(latency.samples) or (count and longest > LONG):
        yield (
            f"outliers: {where}: {count} of {len(latency.samples)} samples, the slowest "
            f"{number(longest)} times the median; all are kept"
        )


def _skipped(case: Case) -> dict[str, list[str]]:
    """Return reason -> the ways of timing that were not run for it: "graph" for all of them, or another."""
    found: dict[str, list[str]] = {}
    for timing in () if case.interrupted else case.timings:
        if timing.check.status == "not run":
            other = "cold" if timing.cache == "cold" else "device clock"
            way = timing.mode if timing.mode == "graph" else other
            ways = found.setdefault(timing.check.reason, [])
            ways += [way] * (way not in ways)
    return found
