"""Summarise what was measured into the numbers of a case."""

from __future__ import annotations

from collections.abc import Sequence

from mla.bench import results
from mla.bench.measure.samples import Measured, Series
from mla.bench.results import stats
from mla.bench.results.timings import by_kind
from mla.bench.subjects.base import Implementation
from mla.bench.workload.scenario import Scenario

#: Host time over the device's own from which a case is launch bound.
LAUNCH_BOUND = 1.3


def fill(case: results.Case, scenario: Scenario, measured: Measured, one: Implementation) -> None:
    """Write everything that timed passes gave into `case`."""
    case.check, case.interrupted = measured.check, measured.interrupted
    case.passes, case.clock = len(measured.passes), measured.headline.clock
    case.warmups, case.settled = measured.warmups, measured.settled
    case.device_state = measured.device_state
    case.timings = [_timing(series, scenario.layers) for series in measured.others]
    if not measured.passes:
        return
    passes = _per_layer(measured.passes, scenario.layers)
    rates = [1e3 * scenario.tokens * len(samples) / sum(samples) for samples in passes]
    case.latency_ms = latency(passes)
    case.tokens_per_s = results.Throughput(median=stats.median(rates), ci95=stats.median_interval(rates))
    case.plan_ms = None if one.plan_ms is None else one.plan_ms / scenario.layers
    switched = enumerate(measured.headline.after_switch)
    case.switch_steps = [index * scenario.steps for index, flag in switched if flag]
    case.launch_bound = launch_bound(case)


def latency(passes: Sequence[Sequence[float]]) -> results.Latency:
    """Return the statistics of at least one pass."""
    samples = [sample for one in passes for sample in one]
    medians = [stats.median(one) for one in passes]
    return results.Latency(
        median=stats.median(samples),
        ci95=stats.median_interval(medians),
        p10=stats.percentile(samples, 10),
        p90=stats.percentile(samples, 90),
        samples=samples,
        drift=stats.drift(medians),
        outliers=stats.outliers(passes),
    )


def _per_layer(passes: Sequence[Sequence[float]], layers: int) -> list[list[float]]:
    return [[sample / layers for sample in samples] for samples in passes]


def _timing(series: Series, layers: int) -> results.Timing:
    return results.Timing(
        mode=series.kind.mode,
        cache=series.kind.cache,
        clock=series.clock,
        passes=len(series.passes),
        check=series.check,
        latency_ms=latency(_per_layer(series.passes, layers)) if series.passes else None,
        method=series.method,
    )


def launch_bound(case: results.Case) -> bool | None:
    """Say whether the host takes well longer to launch a forward than the device to compute it.

    The device's time is that of a replayed graph, warm, on either clock; None where neither was timed.
    """
    timings = by_kind(case)
    graphs = [timings[name].latency_ms for name in ("graph", "graph_device") if name in timings]
    medians = [found.median for found in graphs if found is not None]
    if case.latency_ms is None or not medians:
        return None
    return case.latency_ms.median > LAUNCH_BOUND * min(medians)
