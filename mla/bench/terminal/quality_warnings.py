"""What a reader must know before trusting a run's numbers: one sentence each. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator

from mla.bench.results.schema import Case, Latency, Run
from mla.bench.terminal.digits import number

#: p90 over p10 from which a machine is called noisy; a growing cache alone gives about 1.1.
NOISY = 1.5
#: Relative change over all passes from which a machine is said to drift.
DRIFTS = 0.05
#: Share of outliers, and times the median that one sample may take, before they are mentioned.
MANY, LONG = 0.01, 10.0


def noise(run: Run) -> list[str]:
    """Return a remark for everything about a run's cases that makes their numbers doubtful or incomplete."""
    return [remark for case in run.cases for remark in _of_case(case)]


def _of_case(case: Case) -> Iterator[str]:
    where = f"{case.scenario}, {case.implementation}"
    if case.settled is False:
        yield (
            f"not settled: {where}: latencies still changed after {case.warmups} warm-up forwards; "
            "raise --warmups, or run again on a quieter machine"
        )
    if case.latency_ms is not None:
        yield from _of_latency(where, case.latency_ms)
    for mode, reason in _left_out(case).items():
        yield f"skipped: {mode} of {where}: {reason}"


def _of_latency(where: str, latency: Latency) -> Iterator[str]:
    spread = latency.p90 / latency.p10
    if spread > NOISY:
        yield (
            f"noisy: {where}: p90 is {number(spread)} times p10; see its samples, or run again on a quieter "
            "machine"
        )
    if latency.drift is not None and abs(latency.drift) > DRIFTS:
        change = "slower" if latency.drift > 0 else "faster"
        yield (
            f"drifts: {where}: became {100 * abs(latency.drift):.0f}% {change} over its passes; the clock of "
            "the device, its temperature or another load changed"
        )
    longest = max(latency.samples) / latency.median
    count = latency.outliers or 0
    if count > MANY * len(latency.samples) or (count and longest > LONG):
        yield (
            f"outliers: {where}: {count} of {len(latency.samples)} samples are far slower than their like, "
            f"the slowest {number(longest)} times the median; all are kept"
        )


def _left_out(case: Case) -> dict[str, str]:
    """Return mode -> why it was not timed."""
    if case.interrupted:
        return {}
    return {one.mode: one.check.reason for one in case.timings if one.check.status == "not run"}
