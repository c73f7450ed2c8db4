"""Turn samples into the statistics of a case, and compare the implementations of one scenario."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mla.bench import results
from mla.bench.measure.samples import Measurement, Samples
from mla.bench.results.cases import by_kind, latency_of, throughput_of
from mla.bench.results.compare import compare_cases
from mla.bench.results.schema import Agreement, Case
from mla.bench.subjects.base import Facts, Outputs
from mla.bench.workload.scenario import Scenario
from mla.verify.tolerances import relative_error

# A case is launch bound from this ratio of host time to device time.
LAUNCH_BOUND = 1.3


def fill(case: results.Case, scenario: Scenario, measurement: Measurement, facts: Facts) -> None:
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
    passes = _per_layer(measurement.passes, scenario.layers)
    case.latency_ms, case.tokens_per_s = latency_of(passes), throughput_of(passes, scenario.tokens)
    case.plan_ms = None if facts.plan_ms is None else facts.plan_ms / scenario.layers
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
        latency_ms=latency_of(_per_layer(samples.passes, layers)) if samples.passes else None,
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


# ------------------------------------------------------------------------------ of one another


def compare(cases: Sequence[Case], outputs: Mapping[str, Outputs]) -> None:
    """Fill the `agreement` of every case with the others; `outputs` are of the same inputs."""
    compared = [case for case in cases if case.implementation in outputs]
    for case in compared:
        pairs = ((other, _pairs(case, other, outputs)) for other in compared if other is not case)
        case.agreement = [_agreement(case, other, common) for other, common in pairs if common]


def _pairs(
    case: Case, other: Case, outputs: Mapping[str, Outputs]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the outputs of the forwards that both kept."""
    mine, theirs = outputs[case.implementation], outputs[other.implementation]
    return [(mine[index], theirs[index]) for index in sorted(mine.keys() & theirs.keys())]


def _agreement(case: Case, other: Case, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Agreement:
    return Agreement(
        implementation=other.implementation,
        relative_difference=relative_error(*pairs),
        speed_ratio=compare_cases(other, case).speedup,
    )
