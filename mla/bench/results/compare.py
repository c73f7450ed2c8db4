"""Compare runs from their result files: how much faster or slower, and with which confidence.

Figures and intervals are those of the runs' own tables, or, where a slow yardstick ran fewer decode steps in
one of them, of the steps of each pass that both have, without the first if that leaves two.
The unit of confidence is the pass, as in a run:
the ratio's interval combines both medians' 95 % intervals, so its confidence is at least 90 %. Differences
within the noise floor count as the same. A median does not see a few slow steps, so whole passes, whose
totals make the throughput, are compared as well: slower there is SLOWER. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mla.bench.results.passes import planned_steps, same_steps, shared_steps
from mla.bench.results.predicted import is_predicted, label, unlabelled
from mla.bench.results.schema import Case, Interval, Run
from mla.parallel.layout import Layout

# Ratios this near 1 were noise on every machine tried.
NOISE = 0.02

# Facts of an environment that move figures: versions, and all that `mla.command.environment` says of threads.
_THREADS = {"torch_threads", "OMP_NUM_THREADS", "KMP_AFFINITY", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
FACTS = {"torch", "python"} | _THREADS

FASTER, SLOWER, SAME, UNDECIDED, REFUSED = "FASTER", "SLOWER", "SAME", "UNDECIDED", "REFUSED"


@dataclass(frozen=True)
class Comparison:
    """One case of a run and the same case of the base run. `ratio` is of times: above 1 is slower."""

    scenario: str
    implementation: str
    verdict: str
    ratio: float | None = None
    interval: Interval | None = None  # at least 90 % confidence
    base_ms: float | None = None  # medians, as the runs print them, and their intervals
    new_ms: float | None = None
    base_ci: Interval | None = None
    new_ci: Interval | None = None
    reason: str = ""
    note: str = ""  # which steps are compared, where a run has fewer
    passes: Interval | None = None  # the interval of the ratio of whole passes
    status: str = "ok"  # of the new run's check; "missing" without such a case
    expected: bool = True  # the base run has a number for this case
    known: bool = True  # the base run has this case

    @property
    def remarks(self) -> str:
        """Reason and note."""
        return "; ".join(filter(None, (self.reason, self.note)))

    @property
    def judged(self) -> bool:
        """Whether there is an interval, from which alone a verdict follows."""
        return self.interval is not None

    def slower_than(self, limit: float) -> bool:
        """Return whether a whole interval is slower by more than `limit` (0.03: 3 %)."""
        return any(found is not None and found[0] > 1 + limit for found in (self.interval, self.passes))


def compare(base: Run, new: Run, noise: float = NOISE) -> list[Comparison]:
    """Compare each case of `new` with the case of `base` of the same scenario, point and implementation.

    Cases that only the base has come last.
    """
    known = {(*key(case), case.dtype): case for case in base.cases}
    by_key = {key(case): case for case in base.cases}
    differ = _run_differences(base, new)
    comparisons, met = [], set()
    for case in new.cases:
        other = known.get((*key(case), case.dtype)) or by_key.get(key(case))
        if other is None:
            new_case = _refused(case, "the base run has no such case", expected=False)
            comparisons.append(replace(new_case, known=False))
            continue
        met.add((*key(other), other.dtype))
        reasons = [*differ, *_case_differences(other, case)]
        refused = _refused(case, "; ".join(reasons), _has_number(other)) if reasons else None
        comparisons.append(refused or _compare(other, case, noise))
    missing = [case for which, case in known.items() if which not in met]
    refusals = [_refused(case, "the new run has no such case", _has_number(case)) for case in missing]
    return comparisons + [replace(one, status="missing") for one in refusals]


def _has_number(case: Case) -> bool:
    return case.latency_ms is not None


def key(case: Case) -> tuple[object, ...]:
    """Return what identifies a case across runs, except its dtype; scenario names follow from it."""
    return case.base, frozenset(case.point.items()), case.op, unlabelled(case.implementation)


def warnings(base: Run, new: Run) -> list[str]:
    """Return differences that do not forbid the comparison: often they are its subject."""
    pairs = [("device", base.backend.device, new.backend.device), ("seed", base.seed, new.seed)]
    for name in sorted({*base.environment, *new.environment} & FACTS):
        pairs.append((name, base.environment.get(name, "unset"), new.environment.get(name, "unset")))
    pairs.append(("layout over ranks", _layouts(base), _layouts(new)))
    if _spreads_context(base, new):
        pairs.append(("attention", base.attention, new.attention))
    return [f"{name} differs: {old} and {now}" for name, old, now in pairs if old != now]


def _layouts(run: Run) -> str:
    """Return how a run's cases were spread over ranks: their ratio to one device is the strong scaling."""
    found = {case.spread.layout if case.spread else "one device" for case in run.cases if _has_number(case)}
    return ", ".join(sorted(found))


def _run_differences(base: Run, new: Run) -> list[str]:
    """Return why no case of two runs can be compared."""
    shared = sorted((base.config.keys() & new.config.keys()) - {"name", "model_type"})
    changed = [key for key in shared if not _same(base.config[key], new.config[key])]
    reasons = [f"config differs in {', '.join(changed)}"] if changed else []
    if base.attention != new.attention and not _spreads_context(base, new):
        reasons.append(f"attention differs: {base.attention} and {new.attention}")
    return reasons


def _spreads_context(*runs: Run) -> bool:
    """Return whether a run has a part of each context on every rank, which no other path than one allows."""
    layouts = {case.spread.layout for run in runs for case in run.cases if case.spread}
    return any(Layout.parse(layout).dcp > 1 for layout in layouts)


def other_work(base: Run, case: Case, new: Run, other: Case) -> list[str]:
    """Return why two cases, of which ranks may have run one, are not the same work."""
    return [*_run_differences(base, new), *_workload_differences(case, other)]


def _same(old: Any, new: Any) -> bool:
    """Compare config values; fields that only a newer version wrote have a neutral default."""
    if isinstance(old, dict) and isinstance(new, dict):
        return all(_same(old[key], new[key]) for key in old.keys() & new.keys())
    return bool(old == new)


def _case_differences(base: Case, new: Case) -> list[str]:
    reasons = [*_prediction_differences(base, new), *_workload_differences(base, new)]
    for which, case in (("base", base), ("new", new)):
        if not _has_number(case):
            because = f" ({case.check.reason})" if case.check.reason else ""
            reasons.append(f"the {which} run has no number, check: {case.check.status}{because}")
    return reasons


def _workload_differences(base: Case, new: Case) -> list[str]:
    names = ["mode", "query_lens", "history", "layers", "op"]
    if _has_number(base) and _has_number(new):  # otherwise there was no clock
        names.append("clock")
    if base.heads is not None and new.heads is not None:  # version 1 did not say
        names.append("heads")
    reasons = [f"dtype differs: {base.dtype} and {new.dtype}"] if base.dtype != new.dtype else []
    reasons += [f"{name} differs" for name in names if getattr(base, name) != getattr(new, name)]
    if new.mode == "decode" and planned_steps(base) != planned_steps(new):  # forwards of a prefill are alike
        reasons.append("steps_per_pass differs")
    return reasons


def _prediction_differences(base: Case, new: Case) -> list[str]:
    """Return why a prediction is not compared with a measurement, nor with one on another link."""
    predicted = [is_predicted(case) for case in (base, new)]
    if predicted[0] != predicted[1]:
        return [f"the {'base' if predicted[0] else 'new'} run is predicted, and the other measured"]
    if base.spread and new.spread and predicted[0] and base.spread.link != new.spread.link:
        return ["both are predicted, on links that differ"]
    return []


def _refused(case: Case, reason: str, expected: bool) -> Comparison:
    where = case.scenario, label(case)
    return Comparison(*where, REFUSED, reason=reason, status=case.check.status, expected=expected)


def _compare(base: Case, new: Case, noise: float) -> Comparison:
    note = _note(base, new)
    base, new = same_steps(base, new)
    old, now = base.latency_ms, new.latency_ms
    assert old is not None
    assert now is not None
    ratio = now.median / old.median
    interval = ratio_interval(now.ci95, old.ci95, ratio)
    passes = _passes_interval(base, new)
    verdict, reason = _verdict(interval, noise), ""
    if interval is None:
        reason = "too few passes for an interval (6 are needed)"
    elif verdict != SLOWER and _verdict(passes, noise) == SLOWER and passes is not None:
        verdict = SLOWER
        reason = f"whole passes take {passes[0]:.3f} to {passes[1]:.3f} times as long: some steps are slow"
    return Comparison(
        scenario=new.scenario,
        implementation=label(new),
        verdict=verdict,
        ratio=ratio,
        interval=interval,
        base_ms=old.median,
        new_ms=now.median,
        base_ci=old.ci95,
        new_ci=now.ci95,
        reason=reason,
        note=note,
        passes=passes,
        status=new.check.status,
    )


def _note(base: Case, new: Case) -> str:
    """Return which steps of two cases are compared, unless all are, and that both are predicted."""
    return "; ".join(filter(None, ("both are predicted" * is_predicted(new), _steps(base, new))))


def _steps(base: Case, new: Case) -> str:
    found = same_steps(base, new)
    if found[0] is base and found[1] is new:
        return ""
    steps = shared_steps(base, new)
    which = f"steps {steps.start + 1} to {steps.stop}" if steps.stop > 1 else "the first steps"
    return f"compared are {which} of each pass, which both runs have"


def ratio_interval(upper: Interval | None, lower: Interval | None, ratio: float) -> Interval | None:
    """Return the interval of a quotient of medians; it holds the ratio, whose medians are of all samples."""
    if upper is None or lower is None or min(*upper, *lower) <= 0:
        return None
    return min(ratio, upper[0] / lower[1]), max(ratio, upper[1] / lower[0])


def _passes_interval(base: Case, new: Case) -> Interval | None:
    """Return the interval of the ratio of times of whole passes, from both throughputs."""
    old, now = base.tokens_per_s, new.tokens_per_s
    if old is None or now is None:
        return None
    return ratio_interval(old.ci95, now.ci95, old.median / now.median)


def _verdict(interval: Interval | None, noise: float) -> str:
    if interval is None:
        return UNDECIDED
    low, high = interval
    if high < 1 - noise:
        return FASTER
    if low > 1 + noise:
        return SLOWER
    return SAME if low >= 1 - noise and high <= 1 + noise else UNDECIDED


def slower(comparisons: Sequence[Comparison], limit: float) -> list[Comparison]:
    """Return the cases whose whole interval is slower by more than `limit`."""
    return [case for case in comparisons if case.slower_than(limit)]
