"""What is wrong or in doubt about a file: counts of cases, never of remarks. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mla.bench.report.panel import case_name
from mla.bench.report.series import grouped
from mla.bench.results.schema import Case, Ceiling, Run
from mla.bench.terminal.digits import number
from mla.bench.terminal.quality_warnings import of_case
from mla.bench.terminal.verdict import is_yardstick

# Most cases without a number that are named on the first screen.
MOST_NAMED = 4
# Repeated measurements of a ceiling that lie further apart than this are mentioned; so are new lengths that
# take longer than repeated ones by more.
SPREAD = 0.10

# Kinds of remarks, as said of a count of cases.
_KINDS = {"drifts": "drifting", "outliers": "with outliers", "skipped": "with ways of timing skipped"}


@dataclass(frozen=True)
class Badge:
    """A count of cases with one status; `status` is a CSS class."""

    status: str
    text: str


def badges(cases: Sequence[Case]) -> list[Badge]:
    """Return what is wrong, the worst first; a single "ok" only if there is nothing."""
    judged = [case for case in cases if not is_yardstick(case)]
    counts = {
        "wrong": sum(case.check.status == "wrong" for case in judged),
        "doubtful": sum(case.check.status == "doubtful" for case in judged),
        "in-doubt": sum(bool(case.roofline.doubt) and case.check.status == "ok" for case in judged),
        "not-run": sum(case.check.status == "not run" for case in judged),
        "interrupted": sum(case.interrupted for case in judged),
    }
    words = {
        "in-doubt": "with limit or time in doubt",
        "not-run": "not run",
        "doubtful": "doubtful: no number",
    }
    found = [
        Badge(status, f"{count} of {_cases(judged)} {words.get(status, status)}")
        for status, count in counts.items()
        if count
    ]
    if not judged:
        return [Badge("not-run", "no case was run")]
    return (found or [Badge("ok", f"{_all(judged)} with the oracle")]) + _yardsticks(len(cases) - len(judged))


def _yardsticks(count: int) -> list[Badge]:
    return (
        [Badge("yardstick", f"and {count} yardstick{'s' * (count > 1)}, where nothing is computed")]
        if count
        else []
    )


def _cases(cases: Sequence[Case]) -> str:
    return f"{len(cases)} case{'s' * (len(cases) > 1)}"


def _all(cases: Sequence[Case]) -> str:
    return f"all {len(cases)} cases agree" if len(cases) > 1 else "the only case agrees"


def named(cases: Sequence[Case]) -> list[Badge]:
    """Return the cases that are wrong or in doubt, with the reasons."""
    found = [
        *(
            _badge(case, case.check.status, case.check.reason)
            for case in cases
            if case.check.status == "wrong"
        ),
        *(_badge(case, "doubtful", case.check.reason) for case in cases if case.check.status == "doubtful"),
        *(_badge(case, "in-doubt", case.roofline.doubt) for case in cases if _in_doubt(case)),
    ]
    rest = len(found) - MOST_NAMED
    more = [Badge("more", f"and {rest} more in the table")] if rest > 0 else []
    return found[:MOST_NAMED] + more


def _in_doubt(case: Case) -> bool:
    return case.check.status == "ok" and bool(case.roofline.doubt)


def _badge(case: Case, status: str, reason: str) -> Badge:
    word = "limit or time in doubt" if status == "in-doubt" else status
    return Badge(status, f"{case_name(case)}: {word}{': ' * bool(reason)}{reason}")


def counted_remarks(run: Run) -> str:
    """Return how many cases each kind of remark is about, such as "3 of 14 cases noisy, 1 drifting"."""
    kinds = [{remark.partition(":")[0] for remark in of_case(case)} for case in run.cases]
    counts = Counter(kind for of_one in kinds for kind in sorted(of_one))
    counts["slower on new lengths"] = sum(map(_slower_on_new_lengths, run.cases))
    said = [(count, _KINDS.get(kind, kind)) for kind, count in counts.items() if count]
    of = [f" of {_cases(run.cases)}", *[""] * len(said)]
    return ", ".join(f"{count}{of[place]} {kind}" for place, (count, kind) in enumerate(said))


def _slower_on_new_lengths(case: Case) -> bool:
    found = case.new_lengths
    return found is not None and found.ms > (1 + SPREAD) * found.repeated_ms


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
