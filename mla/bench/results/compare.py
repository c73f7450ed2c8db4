"""The one comparison of two cases: the ratio of their median times, its interval and a verdict.

`compare_cases` serves everything that is held against something else: the implementations of a run
(`compare_implementations`), and two runs (`compare`), of which one may be of several ranks.

Figures and intervals are those of the runs' own tables. Where one case ran fewer decode steps, both are
compared by the steps that they share, without the first if that leaves two. The unit of confidence is the
pass: the ratio's interval combines both medians' 95 % intervals, so its confidence is at least 90 %. A median
does not see a few slow steps, so whole passes, whose totals make the throughput, are compared as well: slower
there is SLOWER. Needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mla.bench.results.cases import added_baselines, is_predicted, label, same_steps, unlabelled
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
    """A case held against a base case; None where only the other one exists.

    Both hold the numbers of the steps that are compared. `ratio` is of times: above 1, the new one is slower.
    """

    base: Case | None
    new: Case | None
    ratio: float | None = None
    interval: Interval | None = None  # at least 90 % confidence
    verdict: str = REFUSED
    reason: str = ""
    note: str = ""  # which steps are compared, whether one is predicted, how a case scales
    passes: Interval | None = None  # the interval of the ratio of whole passes
    added: bool = False  # a baseline that nobody asked for: no gate depends on it

    @property
    def _either(self) -> Case:
        case = self.new or self.base
        assert case is not None
        return case

    @property
    def scenario(self) -> str:
        """The scenario of both."""
        return self._either.scenario

    @property
    def implementation(self) -> str:
        """The implementation, with a word if its times are predicted."""
        return label(self._either)

    @property
    def status(self) -> str:
        """The status of the new case's check; "missing" without such a case."""
        return self.new.check.status if self.new else "missing"

    @property
    def expected(self) -> bool:
        """Whether the base has a number for this case."""
        return self.base is not None and self.base.latency_ms is not None

    @property
    def remarks(self) -> str:
        """Reason and note."""
        return "; ".join(filter(None, (self.reason, self.note)))

    @property
    def decided(self) -> bool:
        """Whether the medians are apart by more than their intervals, and whole passes do not contradict."""
        if self.interval is None or self.interval[0] <= 1 <= self.interval[1]:
            return False
        return self.verdict == (FASTER if self.interval[1] < 1 else SLOWER)

    @property
    def speedup(self) -> float | None:
        """How many times as fast the new case is."""
        return 1 / self.ratio if self.ratio else None

    @property
    def speedup_interval(self) -> Interval | None:
        """The interval of `speedup`."""
        return (1 / self.interval[1], 1 / self.interval[0]) if self.interval else None

    def slower_than(self, limit: float) -> bool:
        """Return whether a whole interval is slower by more than `limit` (0.03: 3 %)."""
        return any(bounds is not None and bounds[0] > 1 + limit for bounds in (self.interval, self.passes))


def compare_cases(base: Case, new: Case, noise: float = NOISE) -> Comparison:
    """Compare two cases of the same work; REFUSED without two numbers. `noise` is what counts as the same."""
    base, new, steps = same_steps(base, new)
    note = ""
    if steps is not None:
        which = f"steps {steps.start + 1} to {steps.stop}" if steps.stop > 1 else "the first steps"
        note = f"comparing {which} of each pass, present in both"
    old, now = base.latency_ms, new.latency_ms
    if old is None or now is None or min(old.median, now.median) <= 0:
        return Comparison(base, new, reason="there are not two numbers to compare", note=note)
    ratio = now.median / old.median
    interval, passes = _ratio_interval(now.ci95, old.ci95, ratio), None
    if base.tokens_per_s and new.tokens_per_s:  # of whole passes, which a rate is the inverse of
        rate, before = new.tokens_per_s, base.tokens_per_s
        passes = _ratio_interval(before.ci95, rate.ci95, before.median / rate.median)
    verdict, reason = _verdict(interval, noise), ""
    if interval is None:
        reason = "too few passes for an interval (6 are needed)"
    elif verdict != SLOWER and _verdict(passes, noise) == SLOWER and passes is not None:
        verdict = SLOWER
        reason = f"whole passes take {passes[0]:.3f} to {passes[1]:.3f} times as long: some steps are slow"
    return Comparison(base, new, ratio, interval, verdict, reason, note, passes)


def compare_implementations(base: Case, new: Case) -> Comparison:
    """Compare two implementations of one scenario of a run. A ratio between the same ops is noise."""
    comparison = compare_cases(base, new, noise=0.0)
    if comparison.ratio is not None and new.ops and new.ops == base.ops:
        return replace(comparison, verdict=UNDECIDED, reason="they run the same ops")
    return comparison


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
            comparisons.append(Comparison(None, case, reason="missing from the base run"))
            continue
        met.add((*key(other), other.dtype))
        if reason := "; ".join([*differ, *_case_differences(other, case)]):
            comparisons.append(Comparison(other, case, reason=reason))
        else:
            comparison = compare_cases(other, case, noise)
            notes = filter(None, (_predicted(other, case), comparison.note, _scaling(base, new, comparison)))
            comparisons.append(replace(comparison, note="; ".join(notes)))
    missing = [case for which, case in known.items() if which not in met]
    comparisons += [Comparison(case, None, reason="missing from the new run") for case in missing]
    added = {False: added_baselines(base), True: added_baselines(new)}
    return [
        replace(comparison, added=comparison.implementation in added[comparison.new is not None])
        for comparison in comparisons
    ]


def key(case: Case) -> tuple[object, ...]:
    """Return what identifies a case across runs, except its dtype; scenario names follow from it."""
    return case.base, frozenset(case.point.items()), case.op, unlabelled(case.implementation)


def warnings(base: Run, new: Run) -> list[str]:
    """Return differences that do not forbid the comparison: often they are its subject."""
    pairs = [("device", base.backend.device, new.backend.device), ("seed", base.seed, new.seed)]
    for name in sorted({*base.environment, *new.environment} & FACTS):
        pairs.append((name, base.environment.get(name, "unset"), new.environment.get(name, "unset")))
    layouts = _layouts(base), _layouts(new)
    pairs += [("layout over ranks", *layouts)] * all(layouts)  # those of a run without numbers are not known
    if _spreads_context(base, new):
        pairs.append(("attention", base.attention, new.attention))
    return [f"{name} differs: {old} and {now}" for name, old, now in pairs if old != now]


def _layouts(run: Run) -> str:
    """Return how a run's cases were spread over ranks: their ratio to one device is the strong scaling."""
    layouts = {case.spread.layout if case.spread else "one device" for case in run.cases if case.latency_ms}
    return ", ".join(sorted(layouts))


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


def _scaling(base: Run, new: Run, comparison: Comparison) -> str:
    """Return the speedup over one device of a case on several of its kind, and its efficiency; else ""."""
    one, several = comparison.base, comparison.new
    alike = base.backend.device == new.backend.device and one is not None and one.spread is None
    if not alike or several is None or several.spread is None or comparison.speedup is None:
        return ""
    more = len(several.spread.ranks) * _threads(new) / _threads(base)
    units, efficiency = "cores" if _on_host(new) else "devices", comparison.speedup / more
    return f"{comparison.speedup:.2f}x on {more:g} times the {units}: efficiency {100 * efficiency:.0f} %"


def _threads(run: Run) -> int:
    """Return the threads of each rank where the device is the host's processor, else 1."""
    threads = run.environment.get("torch_threads", "")
    return int(threads) if _on_host(run) and re.fullmatch("[1-9][0-9]{0,5}", threads) else 1


def _on_host(run: Run) -> bool:
    return run.backend.device == run.environment.get("processor")


def _same(old: Any, new: Any) -> bool:
    """Compare config values; fields that only a newer version wrote have a neutral default."""
    if isinstance(old, dict) and isinstance(new, dict):
        return all(_same(old[key], new[key]) for key in old.keys() & new.keys())
    return bool(old == new)


def _case_differences(base: Case, new: Case) -> Iterator[str]:
    """Yield why two cases cannot be compared."""
    timed, (old, now) = base.latency_ms and new.latency_ms, (base.spread, new.spread)
    if is_predicted(base) != is_predicted(new) and (old is None or now is None or old.layout != now.layout):
        yield f"{_predicted(base, new)}, on layouts that differ"
    elif old and now and old.predicted and now.predicted and old.link != now.link:
        yield "both are predicted, on links that differ"
    if base.dtype != new.dtype:
        yield f"dtype differs: {base.dtype} and {new.dtype}"
    names = ["mode", "query_lens", "history", "layers", "op", *["clock"] * bool(timed)]
    names += ["heads"] * (base.heads is not None and new.heads is not None)  # version 1 did not say
    yield from (f"{name} differs" for name in names if getattr(base, name) != getattr(new, name))
    steps = {case.planned.steps if case.planned else case.steps_per_pass for case in (base, new)}
    if new.mode == "decode" and len(steps) > 1:  # forwards of a prefill are alike
        yield "steps_per_pass differs"
    for which, case in (("base", base), ("new", new)):
        if case.latency_ms is None:
            because = f" ({case.check.reason})" if case.check.reason else ""
            yield f"the {which} run has no number, check: {case.check.status}{because}"


def _predicted(base: Case, new: Case) -> str:
    """Return which of two cases is predicted; "" for none."""
    if is_predicted(base) and is_predicted(new):
        return "both are predicted"
    which = "base" if is_predicted(base) else "new" if is_predicted(new) else ""
    return f"the {which} run is predicted, and the other measured" if which else ""


def _ratio_interval(upper: Interval | None, lower: Interval | None, ratio: float) -> Interval | None:
    """Return the interval of a quotient of medians; it holds the ratio, whose medians are of all samples."""
    if upper is None or lower is None or min(*upper, *lower) <= 0:
        return None
    return min(ratio, upper[0] / lower[1]), max(ratio, upper[1] / lower[0])


def _verdict(interval: Interval | None, noise: float) -> str:
    if interval is None:
        return UNDECIDED
    low, high = interval
    if high < 1 - noise:
        return FASTER
    if low > 1 + noise:
        return SLOWER
    return SAME if low >= 1 - noise and high <= 1 + noise else UNDECIDED
