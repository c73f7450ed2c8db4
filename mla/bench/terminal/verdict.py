"""Which implementation is fastest, by how much, and how near the limit: a sentence each. Needs no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mla.bench.results.compare import Comparison, compare_implementations
from mla.bench.results.schema import Case, Latency, Run, Throughput
from mla.bench.terminal.digits import between, known, quoted, unreliable


@dataclass(frozen=True)
class Contest:
    """The cases of one scenario: `leaders` are the fastest and all that are not proven slower than it."""

    leaders: Sequence[Case]
    beaten: Sequence[Case]  # the fastest of them first
    without: Sequence[Case]  # no number: wrong, doubtful, not run

    @property
    def lead(self) -> Comparison | None:
        """The one that is proven to be the fastest, against the next; None for several, or one alone."""
        alone = len(self.leaders) == 1 and self.beaten
        return compare_implementations(self.beaten[0], self.leaders[0]) if alone else None

    @property
    def outcome(self) -> str:
        """How it ended, in a few words."""
        if not self.leaders:
            return "no number"
        if len(self.leaders) > 1:
            return "no decision"
        if self.leaders[0].roofline.doubt:
            return "suspect limit or time"
        return f"{self.leaders[0].implementation} is fastest" if self.beaten else "only one has a number"


@dataclass(frozen=True)
class Verdict:
    """What to say of one scenario or one sweep."""

    where: str
    text: str
    is_sweep: bool = False

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


def status(case: Case) -> str:
    """Return the status of a case's check; "not timed" if its outputs are right and there is no number."""
    return "not timed" if case.check.status == "ok" and case.latency_ms is None else case.check.status


def mark(case: Case) -> str:
    """Return what colours a case: its status, "in-doubt" or "yardstick". On the page it is a CSS class."""
    if is_yardstick(case):
        return "yardstick"
    if case.check.status == "ok" and case.roofline.doubt:
        return "in-doubt"
    return status(case).replace(" ", "-")


def times_as_fast(comparison: Comparison) -> tuple[str, str]:
    """Return a speedup, such as "4.0x", and its interval, such as "(3.3 .. 5.1)"; "" without one."""
    speedup, interval = comparison.speedup, comparison.speedup_interval
    return f"{known(speedup, interval)}x", f"({between(interval, speedup, interval)})" if interval else ""


def contest(cases: Iterable[Case]) -> Contest:
    """Rank the cases of one scenario, without yardsticks and numbers that failed their check."""
    taking_part = [case for case in cases if not is_yardstick(case)]
    right = [case for case in taking_part if case.check.status == "ok"]
    without = [case for case in taking_part if case.latency_ms is None or case.check.status != "ok"]
    timed = [(case.latency_ms.median, place) for place, case in enumerate(right) if case.latency_ms]
    ranked = [right[place] for _, place in sorted(timed)]
    beaten = [case for case in ranked[1:] if compare_implementations(case, ranked[0]).decided]
    return Contest([case for case in ranked if case not in beaten], beaten, without)


def verdicts(run: Run) -> list[Verdict]:
    """Return a verdict per scenario, and one for several points of a sweep, in the order of the run."""
    groups: dict[tuple[str, bool], dict[str, list[Case]]] = {}
    for case in run.cases:
        place = (case.base, True) if case.point else (case.scenario, False)
        groups.setdefault(place, {}).setdefault(case.scenario, []).append(case)
    return [
        _of_sweep(where, [contest(cases) for cases in scenarios.values()])
        if is_sweep and len(scenarios) > 1
        else of_scenario(*next(iter(scenarios.items())))
        for (where, is_sweep), scenarios in groups.items()
    ]


def of_scenario(where: str, cases: Iterable[Case]) -> Verdict:
    """Return which of the cases of one scenario is fastest."""
    ranking = contest(cases)
    if not ranking.leaders:
        return Verdict(where, _without(ranking).removeprefix("; ") or "nothing was compared")
    text = _open(ranking) if len(ranking.leaders) > 1 else _ahead(ranking)
    return Verdict(where, f"{text}, {near(ranking.leaders[0])}{_without(ranking)}")


def _ahead(ranking: Contest) -> str:
    first = ranking.leaders[0]
    if ranking.lead:
        ratio, bounds = times_as_fast(ranking.lead)
        rank = f", the fastest of {len(ranking.beaten)} others" if len(ranking.beaten) > 1 else ""
        return (
            f"{first.implementation} is {ratio} as fast as {ranking.beaten[0].implementation} {bounds}{rank}"
        )
    latency = first.latency_ms
    number = quoted(latency.median, latency.ci95, "ms") if latency else "-"
    return f"only {first.implementation} has a number: {number}"


def _open(ranking: Contest) -> str:
    """Return that several may be the fastest, and why: no ratio of theirs means anything."""
    names = [case.implementation for case in ranking.leaders]
    reasons = {compare_implementations(case, ranking.leaders[0]).reason for case in ranking.leaders[1:]}
    why = reasons.pop() if len(reasons) == 1 else ""
    slower = [case.implementation for case in ranking.beaten]
    text = f"no decision between {', '.join(names[:-1])} and {names[-1]}: {why or 'their intervals overlap'}"
    return f"{text}; slower: {', '.join(slower)}" if slower else text


def _without(ranking: Contest) -> str:
    """Name the cases without a number and why."""
    names = [f"{case.implementation} ({status(case)})" for case in ranking.without]
    return f"; no number: {', '.join(names)}" if names else ""


def near(case: Case) -> str:
    """Return how near a case is to its limit, unless its time is not known."""
    limit = case.roofline
    if why_unreliable(case):
        return "its share of the limit is unknown"
    if limit.doubt:
        return "but its limit or its time is suspect"
    if limit.fraction is None:
        return "no limit known"
    return f"at {100 * limit.fraction:.0f} % of the {f'{limit.bound} ' if limit.bound else ''}limit"


def _of_sweep(where: str, contests: Sequence[Contest]) -> Verdict:
    """Count the outcomes of all points, and say how far apart and how near their limits the fastest are."""
    outcomes = Counter(ranking.outcome for ranking in contests)
    told = [", ".join(f"{outcome} at {count}" for outcome, count in outcomes.most_common())]
    only = {case.implementation for ranking in contests for case in (*ranking.leaders, *ranking.without)}
    if len(only) == 1 and set(outcomes) == {"only one has a number"}:
        told = [f"only {only.pop()} has numbers"]
    leads = [lead for each in contests if (lead := each.lead) and not each.leaders[0].roofline.doubt]
    if ratios := [lead.speedup for lead in leads if lead.speedup]:
        told.append(f"{_range(ratios, 'x')} as fast as the next")
    leaders = [ranking.leaders[0] for ranking in contests if ranking.leaders]
    shares = [case.roofline.fraction for case in leaders if not why_unreliable(case)]
    if known_shares := [round(100 * share) for share in shares if share is not None]:
        told.append(f"at {_range(known_shares, ' %')} of the limit")
    if counts := Counter(status(case) for ranking in contests for case in ranking.without):
        without = ", ".join(f"{count} {name}" for name, count in counts.items())
        told.append(f"cases without a number: {without}")
    return Verdict(f"{where} ({len(contests)} points)", "; ".join(told), True)


def _range(values: Sequence[float], unit: str) -> str:
    low, high = (known(choose(values), None) for choose in (min, max))
    return f"{low}{unit}" if low == high else f"{low}{unit} to {high}{unit}"
