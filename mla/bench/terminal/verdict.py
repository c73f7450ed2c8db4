"""Who won a scenario, by how much and how near the limit: a sentence each. Needs no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mla.bench.results import passes
from mla.bench.results.schema import Case, Interval, Latency, Run, Throughput
from mla.bench.terminal.digits import between, known, quoted, unreliable

# "doubt": the one ahead is faster than its limit.
Outcome = Literal["won", "doubt", "open", "alone", "none", "absent"]


@dataclass(frozen=True)
class Speed:
    """How many times as fast one case is as another. The interval combines both medians' 95 % intervals."""

    value: float
    interval: Interval | None

    @property
    def decided(self) -> bool:
        """Return whether the intervals of the two medians lie apart."""
        return self.interval is not None and not self.interval[0] <= 1 <= self.interval[1]

    @property
    def bounds(self) -> str:
        """Return the interval in brackets, with a space before it; "" without one."""
        return f" ({between(self.interval, self.value, self.interval)})" if self.interval else ""

    def __str__(self) -> str:
        return f"{known(self.value, self.interval)}x as fast"


@dataclass(frozen=True)
class Contest:
    """The cases of one scenario: `leaders` are the fastest and all that are not proven slower than it."""

    leaders: Sequence[Case]
    beaten: Sequence[Case]  # the fastest of them first
    without: Sequence[Case]  # no number: wrong, doubtful, not run

    @property
    def outcome(self) -> Outcome:
        """Return whether there is a winner, one in doubt, no decision, nothing to decide, or no number."""
        if not self.leaders:
            return "none"
        if len(self.leaders) > 1:
            return "open"
        if self.leaders[0].roofline.doubt:
            return "doubt"
        return "won" if self.beaten else "alone"


@dataclass(frozen=True)
class Verdict:
    """What to say of one scenario or one sweep."""

    where: str
    outcome: Outcome
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


def is_yardstick(case: Case) -> bool:
    """Return whether a case has a number although nothing was computed that an oracle could check."""
    return case.latency_ms is not None and (case.check.status == "not run" or case.cost.flops == 0)


def headline_number(case: Case) -> Latency | Throughput | None:
    """Return what a case is known by: the latency of a prefill or of an op, the throughput of a decode."""
    return case.latency_ms if case.op or case.mode == "prefill" else case.tokens_per_s


def why_unreliable(case: Case) -> str:
    """Return why the headline of a case is not to be relied on, or nothing.

    Few passes that the user asked for are not held against it.
    """
    estimate, planned = headline_number(case), case.planned
    if estimate is None:
        return ""
    if unreliable(estimate.median, estimate.ci95):
        return "the interval is wider than the number"
    if planned and estimate.ci95 is None and case.passes < planned.passes:
        return f"{case.passes} of {planned.passes} passes, no interval"
    return ""


def speed(case: Case, other: Case) -> Speed | None:
    """Return how many times as fast `case` is, by the latencies of the same steps; None without both."""
    case, other = passes.same_steps(case, other)
    mine, theirs = case.latency_ms, other.latency_ms
    if mine is None or theirs is None or min(mine.median, theirs.median) <= 0:
        return None
    interval = None
    if mine.ci95 and theirs.ci95 and min(mine.ci95[0], theirs.ci95[0]) > 0:
        interval = (theirs.ci95[0] / mine.ci95[1], theirs.ci95[1] / mine.ci95[0])
    return Speed(theirs.median / mine.median, interval)


def same_ops(case: Case, other: Case) -> bool:
    """Return whether two cases run the same ops, so that a ratio between them would be noise."""
    return bool(case.ops) and case.ops == other.ops


def contest(cases: Iterable[Case]) -> Contest:
    """Rank the cases of one scenario, without yardsticks and numbers that failed their check."""
    taking_part = [case for case in cases if not is_yardstick(case)]
    without = [case for case in taking_part if case.latency_ms is None or case.check.status != "ok"]
    ranked = sorted(
        (case for case in taking_part if case.check.status == "ok" and case.latency_ms), key=_median
    )
    beaten = [case for case in ranked[1:] if _beats(ranked[0], case)]
    leaders = [case for case in ranked if all(case is not one for one in beaten)]
    return Contest(leaders, beaten, without)


def _median(case: Case) -> float:
    return case.latency_ms.median if case.latency_ms else 0.0


def _beats(case: Case, other: Case) -> bool:
    found = speed(case, other)
    return found is not None and found.decided and not same_ops(case, other)


def verdicts(run: Run) -> list[Verdict]:
    """Return a verdict per scenario, and one for all points of a sweep, in the order of the run."""
    groups: dict[tuple[str, bool], dict[str, list[Case]]] = {}
    for case in run.cases:
        place = (case.base, True) if case.point else (case.scenario, False)
        groups.setdefault(place, {}).setdefault(case.scenario, []).append(case)
    found = []
    for (where, is_sweep), scenarios in groups.items():
        if is_sweep:
            found.append(_of_sweep(where, [contest(cases) for cases in scenarios.values()]))
        else:
            found.append(of_scenario(where, scenarios[where]))
    return found


def of_scenario(where: str, cases: Iterable[Case]) -> Verdict:
    """Return who won among all cases of one scenario."""
    one = contest(cases)
    if one.outcome == "none":
        text = f"nobody won{_without(one) or ': nothing was compared'}"
    else:
        ways = {"won": _won, "doubt": _ahead, "open": _open, "alone": _alone}
        text = f"{ways[one.outcome](one)}, {near(one.leaders[0])}{_without(one)}"
    return Verdict(where, one.outcome, text)


def _won(one: Contest) -> str:
    return f"{one.leaders[0].implementation} won, {_over(one.leaders[0], one.beaten)}"


def _ahead(one: Contest) -> str:
    first = one.leaders[0]
    return f"{first.implementation} is ahead, {_over(first, one.beaten)}" if one.beaten else _alone(one)


def _over(first: Case, beaten: Sequence[Case]) -> str:
    """Return how much faster the first is than the next."""
    found = speed(first, beaten[0])
    rank = f", the next of {len(beaten)}" if len(beaten) > 1 else ""
    return f"{found} as {beaten[0].implementation}{found.bounds if found else ''}{rank}"


def _open(one: Contest) -> str:
    first, *others = one.leaders
    names = _listed([case.implementation for case in one.leaders])
    text = f"no decision between {names}{_why_open(first, others)}"
    return f"{text}; {first.implementation} is {_over(first, one.beaten)}" if one.beaten else text


def _why_open(first: Case, others: Sequence[Case]) -> str:
    if all(same_ops(first, other) for other in others):
        return ", which run the same ops"
    found = speed(first, others[0])
    if found is None or found.interval is None:
        return f": {found} by medians, but too few passes for an interval (6 are needed)"
    if len(others) > 1:
        return f": their intervals overlap that of the fastest, {first.implementation}"
    return f": {found}{found.bounds}, the intervals overlap"


def _alone(one: Contest) -> str:
    first = one.leaders[0]
    latency = first.latency_ms
    number = quoted(latency.median, latency.ci95, "ms") if latency else "-"
    return f"only {first.implementation} has a number: {number}"


def _without(one: Contest) -> str:
    """Name the cases without a number and why."""
    names = [f"{case.implementation} ({status(case)})" for case in one.without]
    return f"; no number: {', '.join(names)}" if names else ""


def status(case: Case) -> str:
    """Return the status of a case's check; "not timed" if its outputs are right and there is no number."""
    return "not timed" if case.check.status == "ok" and case.latency_ms is None else case.check.status


def near(case: Case) -> str:
    """Return how near a case is to its limit, unless its time is not known."""
    limit = case.roofline
    if why_unreliable(case):
        return "its share of the limit is unknown"
    if limit.doubt:
        return "but its limit or its time is in doubt"
    if limit.fraction is None:
        return "no limit known"
    return f"at {100 * limit.fraction:.0f} % of the {f'{limit.bound} ' if limit.bound else ''}limit"


_COUNTED: dict[Outcome, str] = {
    "doubt": "limit or time in doubt at",
    "open": "no decision at",
    "alone": "only one has a number at",
    "none": "no number at",
}


def _of_sweep(where: str, contests: Sequence[Contest]) -> Verdict:
    """Count the outcomes of all points."""
    wins = Counter(one.leaders[0].implementation for one in contests if one.outcome == "won")
    outcomes = Counter(one.outcome for one in contests)
    parts = [f"{name} won {count}" for name, count in wins.most_common()]
    parts += [f"{words} {outcomes[outcome]}" for outcome, words in _COUNTED.items() if outcomes[outcome]]
    only = {case.implementation for one in contests for case in (*one.leaders, *one.without)}
    if len(only) == 1 and set(outcomes) == {"alone"}:
        parts = [f"only {only.pop()} has numbers"]
    text = "; ".join([", ".join(parts), *_ranges(contests), *_missing(contests)])
    order: tuple[Outcome, ...] = ("doubt", "won", "open", "alone", "none")
    overall = next(outcome for outcome in order if outcomes[outcome])
    return Verdict(f"{where} ({len(contests)} point{'s' * (len(contests) > 1)})", overall, text)


def _ranges(contests: Sequence[Contest]) -> Iterator[str]:
    """Yield how much faster winners are than the next, and how near the fastest are to their limits."""
    pairs = [(one.leaders[0], one.beaten[0]) for one in contests if one.outcome == "won"]
    ratios = [found.value for pair in pairs if (found := speed(*pair))]
    if ratios:
        yield f"winners {_range(ratios, 'x')} as fast as the next"
    leaders = [one.leaders[0] for one in contests if one.leaders]
    shares = [case.roofline.fraction for case in leaders if not why_unreliable(case)]
    known_shares = [100 * share for share in shares if share is not None]
    if known_shares:
        yield f"at {_range([round(share) for share in known_shares], ' %')} of the limit"


def _missing(contests: Sequence[Contest]) -> Iterator[str]:
    counts = Counter(status(case) for one in contests for case in one.without)
    if counts:
        yield "cases without a number: " + ", ".join(f"{count} {name}" for name, count in counts.items())


def _range(values: Sequence[float], unit: str) -> str:
    low, high = (known(choose(values), None) for choose in (min, max))
    return f"{low}{unit}" if low == high else f"{low}{unit} to {high}{unit}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
