"""Compare runs from their result files: how much faster or slower, and with which confidence.

The unit of confidence is the pass, as in a run: the ratio's interval combines both medians' 95 % intervals,
so its confidence is at least 90 %. Differences within the noise floor count as the same. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mla.bench.results import stats
from mla.bench.results.schema import Case, Interval, Run

# Ratios this near 1 were noise on every machine tried.
NOISE = 0.02

FASTER, SLOWER, SAME, UNDECIDED, REFUSED = "FASTER", "SLOWER", "SAME", "UNDECIDED", "REFUSED"


@dataclass(frozen=True)
class Comparison:
    """One case of a run and the same case of the base run. `ratio` is of times: above 1 is slower."""

    scenario: str
    implementation: str
    verdict: str
    ratio: float | None = None
    interval: Interval | None = None  # at least 90 % confidence
    base_ms: float | None = None
    new_ms: float | None = None
    reason: str = ""

    def slower_than(self, limit: float) -> bool:
        """Return whether the whole interval is slower by more than `limit` (0.03: 3 %)."""
        return self.interval is not None and self.interval[0] > 1 + limit


def compare(base: Run, new: Run, noise: float = NOISE) -> list[Comparison]:
    """Compare each case of `new` with the case of `base` of the same scenario, point and implementation."""
    known = {(*_key(case), case.dtype): case for case in base.cases}
    dtypes = {_key(case): case.dtype for case in base.cases}
    differ = _run_differences(base, new)
    comparisons = []
    for case in new.cases:
        other = known.get((*_key(case), case.dtype))
        if other is None:
            only = dtypes.get(_key(case))
            why = f"dtype differs: {only} and {case.dtype}" if only else "the base run has no such case"
            comparisons.append(_refused(case, why))
        else:
            reasons = [*differ, *_case_differences(other, case)]
            refused = _refused(case, "; ".join(reasons)) if reasons else None
            comparisons.append(refused or _compare(other, case, noise))
    return comparisons


def _key(case: Case) -> tuple[object, ...]:
    """Return what identifies a case across runs, except its dtype; scenario names follow from it."""
    return case.base, frozenset(case.point.items()), case.op, case.implementation


def warnings(base: Run, new: Run) -> list[str]:
    """Return differences that do not forbid the comparison: often they are its subject."""
    pairs = [("device", base.backend.device, new.backend.device), ("seed", base.seed, new.seed)]
    for key in sorted({*base.environment, *new.environment} & {"torch", "torch_threads", "python"}):
        pairs.append((key, base.environment.get(key), new.environment.get(key)))
    return [f"{name} differs: {old} and {now}" for name, old, now in pairs if old != now]


def _run_differences(base: Run, new: Run) -> list[str]:
    """Return why no case of two runs can be compared."""
    shared = sorted((base.config.keys() & new.config.keys()) - {"name", "model_type"})
    changed = [key for key in shared if not _same(base.config[key], new.config[key])]
    reasons = [f"config differs in {', '.join(changed)}"] if changed else []
    if base.attention != new.attention:
        reasons.append(f"attention differs: {base.attention} and {new.attention}")
    return reasons


def _same(old: Any, new: Any) -> bool:
    """Compare config values; fields that only a newer version wrote have a neutral default."""
    if isinstance(old, dict) and isinstance(new, dict):
        return all(_same(old[key], new[key]) for key in old.keys() & new.keys())
    return bool(old == new)


def _case_differences(base: Case, new: Case) -> list[str]:
    names = ["mode", "query_lens", "history", "steps_per_pass", "clock", "layers", "op"]
    if base.heads is not None and new.heads is not None:  # version 1 did not say
        names.append("heads")
    reasons = [f"{name} differs" for name in names if getattr(base, name) != getattr(new, name)]
    for which, case in (("base", base), ("new", new)):
        if case.latency_ms is None:
            reasons.append(f"the {which} run has no number, check: {case.check.status}")
    return reasons


def _refused(case: Case, reason: str) -> Comparison:
    return Comparison(case.scenario, case.implementation, REFUSED, reason=reason)


def _compare(base: Case, new: Case, noise: float) -> Comparison:
    (old_ms, old_range), (new_ms, new_range) = _time(base), _time(new)
    ratio = new_ms / old_ms
    interval = None
    if old_range is not None and new_range is not None:
        interval = (new_range[0] / old_range[1], new_range[1] / old_range[0])
    verdict = _verdict(interval, noise)
    reason = "too few passes for an interval (6 are needed)" if interval is None else ""
    return Comparison(new.scenario, new.implementation, verdict, ratio, interval, old_ms, new_ms, reason)


def _verdict(interval: Interval | None, noise: float) -> str:
    if interval is None:
        return UNDECIDED
    low, high = interval
    if high < 1 - noise:
        return FASTER
    if low > 1 + noise:
        return SLOWER
    return SAME if low >= 1 - noise and high <= 1 + noise else UNDECIDED


def _time(case: Case) -> tuple[float, Interval | None]:
    """Return the median milliseconds per forward and its interval, from totals of passes."""
    assert case.latency_ms is not None
    samples, steps = case.latency_ms.samples, case.steps_per_pass
    passes = [sum(samples[i : i + steps]) / steps for i in range(0, len(samples), steps)]
    return stats.median(passes), stats.median_interval(passes)


def slower(comparisons: Sequence[Comparison], limit: float) -> list[Comparison]:
    """Return the cases whose whole interval is slower by more than `limit`."""
    return [case for case in comparisons if case.slower_than(limit)]
