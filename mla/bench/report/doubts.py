"""What is wrong or in doubt about a file: counts of cases, never of remarks. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mla.bench.report.panel import case_name
from mla.bench.report.series import grouped
from mla.bench.report.tables import css_class
from mla.bench.results.schema import Case, Ceiling, Run
from mla.bench.terminal.digits import number
from mla.bench.terminal.lines import of_case
from mla.bench.terminal.verdict import is_yardstick

# Most cases without a number that are named on the first screen.
MOST_NAMED = 4
# Repeated measurements of a ceiling that lie further apart than this are mentioned.
SPREAD = 0.10

# Kinds of cases that are not simply right, the worst first, as said of a count.
_WORDS = {
    "wrong": "wrong",
    "doubtful": "doubtful: no number",
    "in-doubt": "with limit or time in doubt",
    "not-run": "not run",
    "not-timed": "not timed",
    "interrupted": "interrupted",
}
# Kinds whose cases are named one by one.
_NAMED = {"wrong": "wrong", "doubtful": "doubtful", "in-doubt": "limit or time in doubt"}
# Kinds of remarks, as said of a count of cases.
_KINDS = {
    "drifts": "drifting",
    "outliers": "with outliers",
    "skipped": "with ways of timing skipped",
    "new lengths": "slower on new lengths",
}


@dataclass(frozen=True)
class Badge:
    """A count of cases with one status; `status` is a CSS class."""

    status: str
    text: str


def badges(cases: Sequence[Case]) -> list[Badge]:
    """Return what is wrong, the worst first; "ok" only if there is nothing. Yardsticks are counted apart."""
    kinds = Counter(map(css_class, cases))
    judged = len(cases) - kinds["yardstick"]
    counts = {kind: kinds[kind] for kind in _WORDS}
    counts["interrupted"] = sum(case.interrupted for case in cases if not is_yardstick(case))
    found = [
        Badge(kind, f"{counts[kind]} of {_cases(judged)} {words}")
        for kind, words in _WORDS.items()
        if counts[kind]
    ]
    if not judged:
        found = [Badge("not-run", "no case was run")]
    if not found:
        agree = f"all {judged} cases agree" if judged > 1 else "the only case agrees"
        found = [Badge("ok", f"{agree} with the oracle")]
    if kinds["yardstick"]:
        some = f"{kinds['yardstick']} yardstick{'s' * (kinds['yardstick'] > 1)}"
        found.append(Badge("yardstick", f"and {some}, where nothing is computed"))
    return found


def _cases(count: int) -> str:
    return f"{count} case{'s' * (count > 1)}"


def named(cases: Sequence[Case]) -> list[Badge]:
    """Return the cases that are wrong or in doubt, with the reasons; the worst first, and not too many."""
    found = [_badge(kind, case) for kind in _NAMED for case in cases if css_class(case) == kind]
    rest = len(found) - MOST_NAMED
    more = [Badge("more", f"and {rest} more in the table")] if rest > 0 else []
    return found[:MOST_NAMED] + more


def _badge(kind: str, case: Case) -> Badge:
    reason = case.roofline.doubt if kind == "in-doubt" else case.check.reason
    return Badge(kind, f"{case_name(case)}: {_NAMED[kind]}{': ' * bool(reason)}{reason}")


def counted_remarks(run: Run) -> str:
    """Return how many cases each kind of remark is about, such as "3 of 14 cases noisy, 1 drifting"."""
    kinds = [{remark.kind for remark in of_case(case)} for case in run.cases]
    counts = Counter(kind for of_one in kinds for kind in sorted(of_one))
    said = [(count, _KINDS.get(kind, kind)) for kind, count in counts.items() if count]
    of = [f" of {_cases(len(run.cases))}", *[""] * len(said)]
    return ", ".join(f"{count}{of[place]} {kind}" for place, (count, kind) in enumerate(said))


def of_limits(ceilings: Sequence[Ceiling]) -> Iterator[str]:
    """Yield which limits are uncertain: measured differently at different times, or by our own op alone."""
    for what, same in grouped(ceilings, _work).items():
        spread = min(same, key=lambda ceiling: (ceiling.lowest or ceiling.value) / ceiling.value)
        if spread.lowest is not None and spread.lowest < (1 - SPREAD) * spread.value:
            factor, unit = (1e12, "TFLOP/s") if spread.work == "matmul" else (1e9, "GB/s")
            low, high = number(spread.lowest / factor), number(spread.value / factor)
            yield f"The limit of {what} was measured as {low} to {high} {unit}; the highest counts."
        if any(ceiling.ours for ceiling in same):
            yield f"The limit of {what} is what our own op reached: nothing from outside judges it."


def _work(ceiling: Ceiling) -> str:
    if ceiling.work == "matmul":
        return " ".join(filter(None, (ceiling.dtype, "products")))
    return "reading" if ceiling.work == "read" else "copying"
