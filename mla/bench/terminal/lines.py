"""Sentences about the cases of a run: details below the table, and warnings. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from mla.bench.results.cases import LEFT_OUT, as_planned, by_kind
from mla.bench.results.compare import Comparison
from mla.bench.results.schema import Case, Latency, NewLengths, Run
from mla.bench.terminal.digits import estimated, number
from mla.text import counted

# A mean of passes this far from the median of forwards is explained: both are printed, side by side.
APART = 0.05
# A forward on unseen lengths that takes this many times as long as on seen ones is warned about.
COSTLY_RATIO = 1.2
# p90 over p10 above which a case is called noisy; a growing cache alone gives about 1.1.
NOISY = 1.5
# Relative change over all passes above which a case is said to drift.
DRIFTS = 0.05
# Share of outliers, and multiple of the median taken by the slowest, above which they are mentioned.
OUTLIER_SHARE, OUTLIER_RATIO = 0.01, 10.0
# Kinds of warnings about one fact, a busy machine.
BUSY = ("not settled", "noisy", "drifts", "outliers")
# The fact of an environment that says how many CPUs others used, such as "1.6 of 2"; absent if they are idle.
OTHERS = "cpus_used_by_others"


def name(case: Case | Comparison) -> str:
    """Return what a sentence calls a case."""
    return f"{case.scenario}, {case.implementation}"


def case_lines(run: Run) -> list[str]:
    """Return lines about further timings, passes, planning, unseen lengths, and the mean of every case."""
    return [
        f"{name(case)}: {text}"
        for case in run.cases
        for text in (*_timings(case), *_passes(case), *_beside(case))
    ]


def _timings(case: Case) -> Iterator[str]:
    """Say what a case took in other ways than the table's columns show."""
    further, warm = by_kind(case), case.latency_ms
    if set(further) <= {"cold"} or warm is None:
        return
    told = [f"{kind.replace('_', ' ')} {estimated(latency)} ms" for kind, latency in further.items()]
    if "cold" in further:  # the first of `KINDS`
        told[0] += f" ({number(further['cold'].median / warm.median)}x warm)"
    launch = {True: "; launch bound", False: "; not launch bound", None: ""}[case.launch_bound]
    yield ", ".join(told) + launch


def _passes(case: Case) -> Iterator[str]:
    """Say what was timed where the workload asks for more; of a decode pass, it was the first steps."""
    planned = case.planned
    if as_planned(case) or planned is None or case.latency_ms is None:
        return
    steps, fewer = case.steps_per_pass, case.steps_per_pass < planned.steps
    of = f"{'the first ' * (fewer and case.mode == 'decode')}{steps}"
    shared = "; ratios to it are of the same steps" if fewer and case.mode == "decode" else ""
    few = ", too few for an interval" * (case.passes < planned.passes and case.latency_ms.ci95 is None)
    passes = counted(case.passes, "pass", "es")
    yield f"timed in {passes} of {of} instead of {planned.passes} of {planned.steps}{few}{shared}"


def _beside(case: Case) -> Iterator[str]:
    """Say what the latency leaves out: planning, unseen lengths, and a mean that tok/s is from."""
    unseen, latency, rate = case.new_lengths, case.latency_ms, case.tokens_per_s
    if latency is not None and case.plan_ms is not None:
        yield f"planning takes {number(case.plan_ms)} ms a batch, not counted in the latency"
    if unseen is not None:
        yield (
            f"unseen lengths: {number(unseen.ms)} ms a forward (planning {number(unseen.plan_ms)}), "
            f"seen: {number(unseen.repeated_ms)} ({number(unseen.repeated_plan_ms)})"
        )
    elif case.spread is not None and (case.spread.predicted or "dcp" in case.spread.layout):
        yield f"unseen lengths were not tried with {case.spread.layout}"
    if latency is not None and rate is not None:
        mean = 1e3 * sum(case.query_lens) / rate.median
        if abs(mean / latency.median - 1) > APART:
            yield f"mean {number(mean)} ms, median {estimated(latency)} ms (tok/s uses the mean)"


class Warned(NamedTuple):
    """A warning: its kind, such as "noisy", the case that it is about, and what is wrong."""

    kind: str
    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.text}"


def quality_warnings(run: Run) -> list[str]:
    """Return a sentence for everything that makes the numbers of a run doubtful or incomplete."""
    return [str(warned) for case in run.cases for warned in of_case(case)]


def folded_warnings(run: Run) -> list[str]:
    """Return the same in one line for a busy machine, and one for everything else that cases share."""
    groups: dict[tuple[str, str], list[str]] = {}
    for warned in (warned for case in run.cases for warned in of_case(case)):
        if warned.kind not in BUSY and not warned.text.startswith(LEFT_OUT):  # which -v says
            groups.setdefault((warned.kind, warned.text), []).append(warned.where)
    lines = [
        str(Warned(kind, places[0] + f" and {len(places) - 1} more" * (len(places) > 1), text))
        for (kind, text), places in groups.items()
    ]
    return [*_busy(run), *lines]


def _busy(run: Run) -> Iterator[str]:
    """Yield that the machine was busy, or that its clock or temperature changed, if anything shows it."""
    unsteady = [case for case in run.cases if any(warned.kind in BUSY for warned in of_case(case))]
    load = run.environment.get(OTHERS, "")
    short, of_all, effects = sum(map(_lacks_passes, run.cases)), f"of {len(run.cases)} cases", []
    if unsteady:
        drift = max(abs(case.latency_ms.drift or 0) if case.latency_ms else 0 for case in unsteady)
        extent = f" (drift up to {100 * drift:.0f} %)" if drift > DRIFTS else ""
        effects.append(f"timings of {len(unsteady)} {of_all} are unsteady{extent}")
    if short:
        effects.append(f"{short} {of_all} got too few passes for an interval")
    if unsteady or load:
        cause = f"other processes used {load} CPUs" if load else "another load or the device's clock changed"
        what = f"{', '.join(effects)}: {cause}" if effects else cause
        yield f"warning: {what}; rerun when idle" + " (-v names the cases)" * bool(effects)
    elif effects:
        yield f"warning: {effects[0]}; give --passes or --runs"


def _lacks_passes(case: Case) -> bool:
    """Return whether a case has no interval, for lack of time: not for an interrupt or a --budget."""
    planned, latency = case.planned, case.latency_ms
    if planned is None or latency is None or case.interrupted:
        return False
    return latency.ci95 is None and planned.due <= case.passes < planned.passes


def of_case(case: Case) -> Iterator[Warned]:
    """Yield the warnings about one case."""
    where = name(case)
    if case.settled is False and case.check.status != "wrong":
        forwards = f"latencies still changed after {case.warmups} warm-up forwards"
        yield Warned("not settled", where, f"{forwards}; raise --warmups, or rerun on an idle machine")
    if case.latency_ms is not None:
        for kind, text in _of_latency(case.latency_ms):
            yield Warned(kind, where, text)
    if case.roofline.doubt:
        yield Warned("above 100 % of its limit", where, case.roofline.doubt)
    if costly := _costly_lengths(case):
        yield Warned("new lengths", where, costly)
    for reason, ways in _skipped(case).items():
        yield Warned("skipped", f"{', '.join(ways)} of {where}", reason)


def _of_latency(latency: Latency) -> Iterator[tuple[str, str]]:
    """Yield kind and text of what is wrong with the samples of a case."""
    if latency.p90 > NOISY * latency.p10:
        spread = f"{number(latency.p90 / latency.p10)} times p10" if latency.p10 else "finite and p10 is 0"
        yield "noisy", f"p90 is {spread}; rerun on an idle machine"
    if latency.drift is not None and abs(latency.drift) > DRIFTS:
        change = f"{100 * abs(latency.drift):.0f} % {'slower' if latency.drift > 0 else 'faster'}"
        yield "drifts", f"{change} over its passes; the clock, the temperature or another load changed"
    longest, count = max(latency.samples) / latency.median, latency.outliers or 0
    if count > OUTLIER_SHARE * len(latency.samples) or (count and longest > OUTLIER_RATIO):
        samples = f"{count} of {len(latency.samples)} samples"
        yield "outliers", f"{samples}, the slowest {number(longest)} times the median; all are kept"


def _costly_lengths(case: Case) -> str:
    """Return a warning where seen lengths are so much faster that a server does not see the headline."""
    unseen, latency = case.new_lengths, case.latency_ms
    if unseen is None or latency is None or unseen.ms <= COSTLY_RATIO * unseen.repeated_ms:
        return ""
    if unseen.ms - unseen.repeated_ms <= _noise(unseen, latency.p90 - latency.p10):
        return ""
    return (
        f"a forward on unseen lengths takes {number(unseen.ms / unseen.repeated_ms)} times as long as on seen"
        " ones, and a server's are unseen; the headline is of seen ones"
    )


def _noise(unseen: NewLengths, spread: float) -> float:
    """Return the gap between two medians of so many forwards that chance alone may make, at 3 deviations.

    `spread` is from p10 to p90, 2.56 standard deviations of a normal distribution; the standard error of a
    median of n is 1.25 deviations over the root of n.
    """
    return 3 * math.sqrt(2) * 1.25 * spread / 2.56 / math.sqrt(unseen.forwards)


def _skipped(case: Case) -> dict[str, list[str]]:
    """Return reason -> the ways of timing that were not run for it: "graph" for all of them, or another."""
    skipped: dict[str, list[str]] = {}
    for timing in () if case.interrupted else case.timings:
        if timing.check.status == "not run":
            other = "cold" if timing.cache == "cold" else "device clock"
            way = timing.mode if timing.mode == "graph" else other
            ways = skipped.setdefault(timing.check.reason, [])
            ways += [way] * (way not in ways)
    return skipped
