"""What no run can have written although every field alone is possible: fields that contradict each other.

Ranges of single fields are in the schema. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mla.bench.results import stats
from mla.bench.results.schema import Case, Ceiling, Interval, Latency, Roofline, Run, Spread, Timing
from mla.errors import UsageError
from mla.parallel.layout import Layout

Faults = Iterator[tuple[str, str]]  # what is wrong, and the JSON path of where

# Statistics are recomputed from samples in another order of operations.
CLOSE = 1e-6
# More than any device has: bytes per second, FLOP per second.
MOST = {"read": 1e18, "copy": 1e18, "matmul": 1e22}
# Bounds of the numbers of a config, as those of a config.json.
LEAST, LARGEST = 1e-30, 1e30


def fault_of_run(run: Run) -> str | None:
    """Return the first fault of a run with its JSON path; None for a valid one."""
    return _first(_run(run))


def fault_of_ceilings(**lists: Sequence[Ceiling]) -> str | None:
    """Return the first fault in lists of ceilings, each under the name of its field."""
    return _first(fault for name, one in lists.items() for fault in _ceilings(one, f"$.{name}"))


def _first(faults: Faults) -> str | None:
    return next((f"{what} - at `{path}`" for what, path in faults), None)


def _run(run: Run) -> Faults:
    seen = set()
    for index, case in enumerate(run.cases):
        path = f"$.cases[{index}]"
        key = (case.scenario, case.base, frozenset(case.point.items()), case.implementation, case.dtype)
        if key in seen:
            yield f"A second case of '{case.scenario}, {case.implementation}'", path
        seen.add(key)
        yield from _case(case, path)
    yield from _ceilings(run.ceilings, "$.ceilings")
    yield from _config(run.config, "$.config")
    if run.plan is not None and len(run.plan.options) % 2:
        yield "Expected options and values in turns", "$.plan.options"


def _config(config: Mapping[str, Any], path: str) -> Faults:
    """Yield numbers that no layer can have: its own are positive, those of its scalings finite."""
    for name, value in config.items():
        if isinstance(value, dict):
            for inner, number in value.items():
                if _is_number(number) and not abs(number) < LARGEST:
                    yield f"Expected a number below {LARGEST:g}, got {number:.6g}", f"{path}.{name}.{inner}"
        elif _is_number(value) and not LEAST < value < LARGEST:
            yield f"Expected a positive number below {LARGEST:g}, got {value:.6g}", f"{path}.{name}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _case(case: Case, path: str) -> Faults:
    yield from _names(case, path)
    if len(case.query_lens) != len(case.history):
        lengths = f"{len(case.history)} for {len(case.query_lens)} requests"
        yield f"Expected as many lengths as `query_lens`, got {lengths}", f"{path}.history"
    elif not any(case.query_lens):
        yield "Expected at least one new token", f"{path}.query_lens"
    yield from _check(case, path)
    yield from _numbers(case, path)
    yield from _planned(case, path)
    if case.spread is not None:
        yield from _prediction(case.spread, f"{path}.spread")
    yield from _roofline(case.roofline, case.latency_ms, f"{path}.roofline")
    if case.spread is not None:
        yield from _spread(case.spread, case.latency_ms, f"{path}.spread")
    for index, timing in enumerate(case.timings):
        yield from _timing(timing, f"{path}.timings[{index}]")


def _names(case: Case, path: str) -> Faults:
    """Yield names that no workload may have: they identify a case, so escaping them would make another."""
    names = {"scenario": case.scenario, "base": case.base, "implementation": case.implementation}
    for name, text in names.items():
        if not text.isprintable() or not (text.strip() or name == "base"):
            yield f"Expected a printable name, got {text!a}", f"{path}.{name}"
    for axis, value in case.point.items():
        if not f"{axis}{value}".isprintable():
            yield f"Expected a printable axis and value, got {axis!a} and {value!a}", f"{path}.point"


def _check(case: Case, path: str) -> Faults:
    check = case.check
    for name, value in (("error_ratio", check.error_ratio), ("relative_error", check.relative_error)):
        if value is not None and not 0 <= value < math.inf:
            yield f"Expected an error from 0, got {value}", f"{path}.check.{name}"
    if check.status == "ok" and (check.relative_error or 0) > 1:
        yield (
            f"Expected at most 1 for a check that is ok, got {check.relative_error:.6g}",
            f"{path}.check.relative_error",
        )
    if check.status == "ok" and (check.error_ratio or 0) > 1:
        yield (
            f"Expected at most 1 for a check that is ok, got {check.error_ratio}",
            f"{path}.check.error_ratio",
        )


def _numbers(case: Case, path: str) -> Faults:
    """Yield what is wrong about the headline's numbers and what is counted of them."""
    if (case.latency_ms is None) != (case.tokens_per_s is None):
        yield "Expected both `latency_ms` and `tokens_per_s` or neither", path
    if case.latency_ms is None or case.tokens_per_s is None:
        return
    if case.check.status in ("wrong", "doubtful"):
        yield f"Expected no number for a case whose check is {case.check.status}", f"{path}.latency_ms"
    samples, steps = case.latency_ms.samples, case.steps_per_pass
    if len(samples) != case.passes * steps:
        expected = f"{case.passes} passes of {steps} steps, got {len(samples)}"
        yield f"Expected the samples of {expected}", f"{path}.latency_ms.samples"
        return
    yield from _latency(case.latency_ms, f"{path}.latency_ms")
    yield from _throughput(case, path)
    if any(step >= len(samples) for step in case.switch_steps):
        yield f"Expected indices below {len(samples)}", f"{path}.switch_steps"


def _planned(case: Case, path: str) -> Faults:
    """Yield that a case was given, or ran, more than the workload asks for."""
    planned = case.planned
    if planned is None:
        return
    if planned.due > planned.passes:
        yield f"Expected at most {planned.passes}, as are planned, got {planned.due}", f"{path}.planned.due"
    if case.passes > planned.due:
        yield f"Expected at most {planned.due} passes, got {case.passes}", f"{path}.passes"
    if case.steps_per_pass > planned.steps:
        yield f"Expected at most {planned.steps} steps, got {case.steps_per_pass}", f"{path}.steps_per_pass"


def _prediction(spread: Spread, path: str) -> Faults:
    """Yield that a prediction does not say which ranks were timed, or that a measurement does."""
    ranks = {one.rank for one in spread.ranks}
    if spread.predicted and not (spread.timed_ranks and ranks.issuperset(spread.timed_ranks)):
        yield f"Expected some of the ranks 0 to {len(ranks) - 1}", f"{path}.timed_ranks"
    if not spread.predicted and (spread.timed_ranks or spread.compute_ms is not None):
        yield "Expected `timed_ranks` and `compute_ms` of a prediction alone", path


def _latency(latency: Latency, path: str) -> Faults:
    found = {
        "median": stats.median(latency.samples),
        "p10": stats.percentile(latency.samples, 10),
        "p90": stats.percentile(latency.samples, 90),
    }
    for name, value in found.items():
        said = getattr(latency, name)
        if not math.isclose(said, value, rel_tol=CLOSE):
            yield f"Expected {value:.6g}, as the samples say, got {said:.6g}", f"{path}.{name}"
    yield from _interval(latency.ci95, (min(latency.samples), max(latency.samples)), f"{path}.ci95")
    if (latency.outliers or 0) > len(latency.samples):
        yield f"Expected at most {len(latency.samples)}, as many as samples", f"{path}.outliers"


def _throughput(case: Case, path: str) -> Faults:
    assert case.latency_ms is not None
    assert case.tokens_per_s is not None
    samples, steps = case.latency_ms.samples, case.steps_per_pass
    totals = [sum(samples[first : first + steps]) for first in range(0, len(samples), steps)]
    if min(totals) <= 0:
        yield "Expected passes that take time", f"{path}.latency_ms.samples"
        return
    tokens, said = sum(case.query_lens), case.tokens_per_s.median
    rate = 1e3 * tokens * len(samples) / sum(samples)
    if not math.isclose(said, rate, rel_tol=CLOSE):
        yield f"Expected {rate:.6g}, as the samples say, got {said:.6g}", f"{path}.tokens_per_s.median"
    rates = [1e3 * tokens * steps / total for total in totals]
    limits = min(rates), max(rates)
    yield from _interval(case.tokens_per_s.ci95, limits, f"{path}.tokens_per_s.ci95")


def _interval(interval: Interval | None, limits: Interval, path: str) -> Faults:
    """Yield that an interval is reversed, or that it lies outside of what was measured."""
    if interval is None:
        return
    low, high = interval
    if low > high:
        yield f"Expected the lower end first, got {low:.6g} and {high:.6g}", path
    elif low < limits[0] * (1 - CLOSE) or high > limits[1] * (1 + CLOSE):
        yield f"Expected an interval within {limits[0]:.6g} and {limits[1]:.6g}, all that was measured", path


def _timing(timing: Timing, path: str) -> Faults:
    if timing.latency_ms is None:
        return
    if timing.check.status in ("wrong", "doubtful"):
        yield f"Expected no number for a timing whose check is {timing.check.status}", f"{path}.latency_ms"
    count = len(timing.latency_ms.samples)
    if timing.passes == 0 or count % timing.passes:
        yield (
            f"Expected {timing.passes} passes of one length, got {count} samples",
            f"{path}.latency_ms.samples",
        )
    yield from _latency(timing.latency_ms, f"{path}.latency_ms")


def _roofline(roofline: Roofline, latency: Latency | None, path: str) -> Faults:
    if roofline.fraction is None:
        return
    if latency is None or roofline.floor_ms is None:
        yield "Expected a fraction only with a latency and a floor", f"{path}.fraction"
    elif not math.isclose(roofline.fraction, roofline.floor_ms / latency.median, rel_tol=CLOSE):
        value = roofline.floor_ms / latency.median
        yield (
            f"Expected {value:.6g}, the floor over the latency, got {roofline.fraction:.6g}",
            f"{path}.fraction",
        )


def _spread(spread: Spread, latency: Latency | None, path: str) -> Faults:
    """Yield that ranks are not those of the layout, or that the case is not the slowest of them."""
    try:
        world = Layout.parse(spread.layout).world
    except UsageError as error:
        yield str(error).rstrip("."), f"{path}.layout"
        return
    if [one.rank for one in spread.ranks] != list(range(world)):
        yield f"Expected ranks 0 to {world - 1}, as many as layout '{spread.layout}' has", f"{path}.ranks"
        return
    if latency is None:
        yield "Expected ranks only with a latency", path
        return
    for one in spread.ranks:
        if len(one.samples) != len(latency.samples):
            said = f"{len(latency.samples)} samples, as the case has, got {len(one.samples)}"
            yield f"Expected {said}", f"{path}.ranks[{one.rank}].samples"
            return
    slowest = map(max, zip(*(one.samples for one in spread.ranks), strict=True))
    pairs = zip(latency.samples, slowest, strict=True)
    if any(not math.isclose(sample, most, rel_tol=CLOSE) for sample, most in pairs):
        yield "Expected samples of the case that are the slowest rank's, forward by forward", f"{path}.ranks"


def _ceilings(ceilings: Sequence[Ceiling], path: str) -> Faults:
    for index, ceiling in enumerate(ceilings):
        most = MOST[ceiling.work]
        if ceiling.value > most:
            yield f"Expected at most {most:g} per second, got {ceiling.value:.6g}", f"{path}[{index}].value"
        if ceiling.lowest is not None and ceiling.lowest > ceiling.value * (1 + CLOSE):
            yield "Expected the lowest measurement to be below the ceiling", f"{path}[{index}].lowest"
