"""Who won between files: every other file against the first, a sentence per scenario. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain

from mla.bench.report.series import ResultFile, comparisons, grouped
from mla.bench.results.compare import FASTER, NOISE, SAME, SLOWER, UNDECIDED, Comparison
from mla.bench.terminal.verdict import Outcome, Verdict, times_as_fast

# Most scenarios of a pair of files that get a sentence of their own.
MOST_LINES = 4
# Longest name of a file that is repeated in every sentence.
LONGEST = 24

_COUNTED = {FASTER: "faster", SLOWER: "slower", SAME: "the same", UNDECIDED: "no decision"}


def verdicts(files: Sequence[ResultFile]) -> list[Verdict]:
    """Return who won, file by file against the first; [] for one file."""
    found: list[Verdict] = []
    for new, cases, _ in comparisons(files):
        found += _pair(files[0], new, cases)
    return found


def _pair(base: ResultFile, new: ResultFile, cases: Sequence[Comparison]) -> Iterator[Verdict]:
    """Yield a sentence per scenario outside of a grid, if they are few, and one that counts the rest."""
    if not any(case.ratio for case in cases):
        why = "; ".join(dict.fromkeys(case.reason or case.verdict for case in cases)) or "no case in common"
        yield Verdict(f"{_name(new)} against {_name(base)}", "open", f"cannot be compared: {why}")
        return
    absent = [case for case in cases if case.status == "missing"]
    cases = [case for case in cases if case.status != "missing"]
    if absent:
        yield _lacks(base, new, absent)
    points = {case.scenario for run in (base.run, new.run) for case in run.cases if case.point}
    plain = grouped((case for case in cases if case.scenario not in points), lambda case: case.scenario)
    said = list(plain.values()) if len(plain) <= MOST_LINES else []
    for case in chain.from_iterable(_leading(base, new, same) for same in said):
        yield Verdict(f"{case.scenario}, {case.implementation}", *_sentence(base, new, case))
    rest = [case for case in cases if case.scenario in points or not said]
    if rest:
        where = f"{len(rest)} {'grid ' * bool(said)}cases, {_name(new)} against {_name(base)}"
        yield Verdict(where, *_counted(rest))


def _lacks(base: ResultFile, new: ResultFile, absent: Sequence[Comparison]) -> Verdict:
    """Return what only the base has, which is nobody's loss: the other file may be about something else."""
    has = {case.scenario for case in new.run.cases}
    named = dict.fromkeys(
        f"{case.scenario}, {case.implementation}" if case.scenario in has else case.scenario
        for case in absent
    )
    text = "; ".join(named) if len(named) <= MOST_LINES else f"{len(absent)} cases of {_name(base)}"
    return Verdict(_name(new), "absent", f"lacks {text}")


def _name(file: ResultFile) -> str:
    """Return letter and name, or the letter alone if the name is long: it stands above the file's results."""
    return file.title if len(file.name) <= LONGEST else file.key


def _leading(base: ResultFile, new: ResultFile, cases: Sequence[Comparison]) -> Iterator[Comparison]:
    """Yield the cases that lost their number, and the first that can be compared, if any."""
    lost = [case for case in cases if _lost(base, new, case)]
    yield from lost
    first = next((case for case in cases if case.ratio is not None), cases[0])
    if not any(first is case for case in lost):
        yield first


def _sentence(base: ResultFile, new: ResultFile, case: Comparison) -> tuple[Outcome, str]:
    if case.ratio is None:
        text = f"{_name(new)} and {_name(base)} cannot be compared: {case.reason or case.verdict}"
        return "none" if _lost(base, new, case) else "open", text
    slow = case.verdict == SLOWER or (case.verdict != FASTER and case.ratio > 1)
    winner, other = (_name(base), _name(new)) if slow else (_name(new), _name(base))
    speed, note = _speed(case, slow), f"; {case.note}" if case.note else ""
    if case.verdict in (FASTER, SLOWER):
        how = f": {case.reason}" if case.reason else f", {_as_fast(speed, other)}"
        return "won", f"{winner} won{how}{note}"
    if case.verdict == SAME:
        return "open", f"{winner} and {other} are the same within {100 * NOISE:g} %{note}"
    why = f", {case.reason}" if case.reason else ""
    return "open", f"no decision between {winner} and {other}: {_as_fast(speed)}{why}{note}"


def _lost(base: ResultFile, new: ResultFile, case: Comparison) -> bool:
    """Return whether only the base has a number for this case."""
    return _has_number(base, case) and not _has_number(new, case)


def _has_number(file: ResultFile, case: Comparison) -> bool:
    where = (case.scenario, case.implementation)
    return any((one.scenario, one.implementation) == where and one.latency_ms for one in file.run.cases)


def _as_fast(speed: str, other: str = "") -> str:
    ratio, _, bounds = speed.partition(" ")
    return f"{ratio} as fast{f' as {other}' * bool(other)} {bounds}".rstrip()


def _speed(case: Comparison, slow: bool) -> str:
    """Return how many times as fast the faster one is: `ratio` is of times, new over base."""
    if slow:
        return times_as_fast(case.ratio, case.interval)
    return times_as_fast(case.speedup, case.speedup_interval)


def _counted(cases: Sequence[Comparison]) -> tuple[Outcome, str]:
    counts = Counter(case.verdict for case in cases)
    known = [f"{words} in {counts.pop(verdict)}" for verdict, words in _COUNTED.items() if counts[verdict]]
    known += [f"{verdict.lower()} in {count}" for verdict, count in counts.items() if count]
    decided = any(case.verdict in (FASTER, SLOWER) for case in cases)
    return "won" if decided else "open", ", ".join(known)
