"""What the page says about a file beside charts and tables, its first screen above all. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from mla.bench.report.data import ResultFile
from mla.bench.report.tables import css_class
from mla.bench.results import compare
from mla.bench.results.compare import Comparison, compare_implementations
from mla.bench.results.schema import Case
from mla.bench.terminal import ceilings, run_table, verdict
from mla.bench.terminal.digits import between, known
from mla.bench.terminal.lines import BUSY, name, of_case
from mla.bench.terminal.verdict import is_yardstick, status, why_unreliable
from mla.text import counted, grouped

# Most tiles of one file, and most cases without a number that are named on the first screen.
MOST_TILES, MOST_NAMED = 6, 4
# Kinds of cases that are not simply right, the worst first, as said of a count.
_WORDS = {
    "wrong": "wrong",
    "doubtful": "doubtful: no number",
    "in-doubt": "with a suspect limit or time",
    "not-run": "not run",
    "not-timed": "not timed",
    "interrupted": "interrupted",
}
# Kinds of warnings, as said of a count, where the kind itself does not do.
_WARNED = {"drifts": "drifting", "outliers": "with outliers", "skipped": "with timing variants skipped"}
_WARNED |= {"new lengths": "slower on unseen lengths"}


class Badge(NamedTuple):
    """Something about cases with one status; `status` is a CSS class."""

    status: str
    text: str


class Tile(NamedTuple):
    """The answer for one scenario: by how much, how far from the limit, how noisy."""

    status: str  # CSS class
    where: str
    value: str  # in the largest letters
    bounds: str = ""  # its interval
    text: str = ""  # what the value is compared with, and what has no number
    number: str = ""  # the headline of the fastest
    near: str = ""  # to the limit, in words
    share: float | None = None  # and in percent
    noise: str = ""
    unsteady: bool = False


def badges(cases: Sequence[Case]) -> list[Badge]:
    """Return what is wrong, the worst first, and what is unsteady; "ok" only if nothing is wrong."""
    kinds = Counter(map(css_class, cases))
    yardsticks, judged = kinds["yardstick"], len(cases) - kinds["yardstick"]
    kinds["interrupted"] = sum(case.interrupted for case in cases if not is_yardstick(case))
    of = f"of {counted(judged, 'case')}"
    badges = [Badge(kind, f"{kinds[kind]} {of} {words}") for kind, words in _WORDS.items() if kinds[kind]]
    if not badges:
        agree = f"all {judged} cases agree" if judged > 1 else "the only case agrees"
        badges = [Badge("ok", f"{agree} with the oracle") if judged else Badge("not-run", "no case was run")]
    warned = Counter(kind for case in cases for kind in sorted(_warned(case)))
    for mark, busy in (("unsteady", True), ("soft", False)):
        told = [f"{n} {_WARNED.get(kind, kind)}" for kind, n in warned.items() if (kind in BUSY) == busy]
        badges += [Badge(mark, f"{of}: {', '.join(told)}")] * bool(told)
    return badges + [Badge("soft", f"{yardsticks} without a result to check")] * bool(yardsticks)


def _warned(case: Case) -> set[str]:
    """Return the kinds of the warnings about a case; a doubt has a badge of its own."""
    return {warned.kind for warned in of_case(case)} - {"above 100 % of its limit"}


def named(cases: Sequence[Case]) -> list[Badge]:
    """Return the cases that are wrong or in doubt, with the reasons; the worst first, and not too many."""
    badges = []
    for kind in ("wrong", "doubtful", "in-doubt"):
        for case in (case for case in cases if css_class(case) == kind):
            doubt = f"suspect limit or time: {case.roofline.doubt}"
            reason = doubt if kind == "in-doubt" else f"{kind}: {case.check.reason}"
            badges.append(Badge(kind, f"{name(case)}: {reason}"))
    more = len(badges) - MOST_NAMED
    return badges[:MOST_NAMED] + [Badge("soft", f"and {more} more in the table")] * (more > 0)


def tiles(file: ResultFile) -> list[Tile]:
    """Return the answer for every scenario outside of a grid, and for the points of a small grid alone."""
    plain = [case for case in file.run.cases if not case.point]
    cases = plain or file.run.cases * (len(file.run.cases) <= MOST_TILES)
    return [_tile(*group) for group in grouped(cases, lambda case: case.scenario).items()][:MOST_TILES]


def _tile(scenario: str, cases: Sequence[Case]) -> Tile:
    ranking = verdict.contest(cases)
    without = ", ".join(f"{case.implementation} ({status(case)})" for case in ranking.without)
    worst = min((css_class(case) for case in ranking.without), key=list(_WORDS).index, default="ok")
    if not ranking.leaders:
        return Tile(worst, scenario, "no number", text=without or "nothing was compared")
    first, *slower = [*ranking.leaders, *ranking.beaten]
    value, bounds, text = _ratio(first, slower, ranking.outcome) if slower else ("", "", "")
    number = run_table.headline(first).rpartition(": ")[2]
    limit, unreliable, busy = first.roofline, why_unreliable(first), _warned(first) & set(BUSY)
    return Tile(
        "in-doubt" if limit.doubt else "unsteady" if unreliable and worst == "ok" else worst,
        f"{scenario}: {first.implementation}",
        value or number,
        bounds,
        "; ".join(filter(None, (text, f"no number: {without}" * bool(without)))),
        number if value else "",
        verdict.near(first),
        None if limit.doubt or unreliable or limit.fraction is None else 100 * limit.fraction,
        _noise(first, busy),
        bool(busy),
    )


def _ratio(first: Case, slower: Sequence[Case], outcome: str) -> tuple[str, str, str]:
    """Return how many times as fast a case is as the next, the interval and a text; undecided, the text."""
    comparison, other = compare_implementations(slower[0], first), slower[0].implementation
    if outcome == "open":
        return "", "", f"no decision against {other}: {comparison.reason or 'their intervals overlap'}"
    rank = f", the fastest of {len(slower)} others" * (len(slower) > 1)
    reason = f" ({comparison.reason})" * bool(comparison.reason)
    return *_times(comparison), f"{'above limit: ' * (outcome == 'doubt')}as fast as {other}{rank}{reason}"


def _times(comparison: Comparison) -> tuple[str, str]:
    """Return a speedup and its interval."""
    speedup, interval = comparison.speedup, comparison.speedup_interval
    return f"{known(speedup, interval)}x" * bool(speedup), between(interval, speedup, interval) * bool(
        interval
    )


def _noise(case: Case, busy: set[str]) -> str:
    """Return how far the times of a case lie apart, and how they drifted."""
    latency = case.latency_ms
    assert latency is not None
    spread = between((latency.p10, latency.p90), latency.median, latency.ci95)
    drift = f", drift {100 * latency.drift:+.1f} %" if latency.drift is not None else ""
    return f"{', '.join(kind for kind in BUSY if kind in busy) or 'steady'}: 80 % within {spread} ms{drift}"


def said(file: ResultFile) -> list[str]:
    """Return a sentence for every grid, for scenarios that got no tile, and for the limits."""
    tiled = {tile.where.partition(": ")[0] for tile in tiles(file)}
    sentences = [str(line) for line in verdict.verdicts(file.run) if line.where not in tiled]
    return [*sentences[:MOST_TILES], *ceilings.run_lines(file.run.ceilings)]


def between_files(base: ResultFile, new: ResultFile) -> tuple[list[Tile], list[str]]:
    """Return how much faster or slower a file is than the base: tiles, and sentences on the rest."""
    pair, cases = f"{new.title} against {base.title}", compare.compare(base.run, new.run)
    shown = [case for case in cases if case.ratio and case.new and not case.new.point][:MOST_TILES]
    tiles = []
    for case in shown:
        where = f"{case.verdict}: {case.scenario}, {case.implementation}"
        text = "; ".join(filter(None, (f"as fast: {pair}", case.remarks)))
        tiles.append(Tile(case.verdict.lower(), where, *_times(case), text))
    rest = [case for case in cases if case not in shown]
    counts = Counter(case.verdict + f" ({case.reason})" * (not case.ratio) for case in rest)
    told = "; ".join(f"{count} {words}" for words, count in counts.items())
    sentences = [f"{pair}: {'further cases: ' * bool(shown)}{told}"] * bool(told)
    return tiles, sentences + [f"Warning: {warning}." for warning in compare.warnings(base.run, new.run)]


def folded(lengths: Sequence[int]) -> str:
    """Return lengths with repeats folded, such as "50 x4, 100 x4"."""
    runs = [(length, sum(1 for _ in same)) for length, same in groupby(lengths)]
    return ", ".join(f"{length} x{count}" if count > 1 else str(length) for length, count in runs)
