"""Turn the samples of an implementation into the statistics of a case."""

from __future__ import annotations

from collections.abc import Sequence

from mla.bench import results
from mla.bench.measure.samples import Measurement, Samples
from mla.bench.results.cases import by_kind
from mla.bench.results.passes import latency, throughput
from mla.bench.subjects.base import Implementation
from mla.bench.workload.scenario import Scenario

# A case is launch bound from this ratio of host time to device time.
LAUNCH_BOUND = 1.3


def fill(case: results.Case, scenario: Scenario, measurement: Measurement, one: Implementation) -> None:
    """Fill `case` with everything that was measured."""
    case.check, case.interrupted = measurement.check, measurement.interrupted
    case.passes, case.clock = len(measurement.passes), measurement.headline.clock
    case.warmups, case.settled = measurement.warmups, measurement.settled
    case.device_state, case.new_lengths = measurement.device_state, measurement.new_lengths
    case.timings = [_timing(samples, scenario.layers) for samples in measurement.others]
    case.planned = results.Planned(
        passes=scenario.rounds, steps=scenario.steps, due=measurement.due or scenario.rounds
    )
    if not measurement.passes:
        return
    passes = _per_layer(one.reported(measurement.passes), scenario.layers)
    case.latency_ms, case.tokens_per_s = latency(passes), throughput(passes, scenario.tokens)
    case.plan_ms = None if one.plan_ms is None else one.plan_ms / scenario.layers
    switched = enumerate(measurement.headline.after_switch)
    case.steps_per_pass = len(passes[0])
    case.switch_steps = [index * case.steps_per_pass for index, flag in switched if flag]
    case.launch_bound = launch_bound(case)


def _per_layer(passes: Sequence[Sequence[float]], layers: int) -> list[list[float]]:
    return [[sample / layers for sample in samples] for samples in passes]


def _timing(samples: Samples, layers: int) -> results.Timing:
    return results.Timing(
        mode=samples.variant.mode,
        cache=samples.variant.cache,
        clock=samples.clock,
        passes=len(samples.passes),
        check=samples.check,
        latency_ms=latency(_per_layer(samples.passes, layers)) if samples.passes else None,
        method=samples.method,
    )


def launch_bound(case: results.Case) -> bool | None:
    """Return whether the host takes much longer to launch a forward than the device to compute it.

    The device's time is that of a replayed graph, warm, on either clock; None if neither was timed.
    """
    timings = by_kind(case)
    graphs = [timings[name].latency_ms for name in ("graph", "graph_device") if name in timings]
    medians = [found.median for found in graphs if found is not None]
    if case.latency_ms is None or not medians:
        return None
    return case.latency_ms.median > LAUNCH_BOUND * min(medians)
