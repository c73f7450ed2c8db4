"""The card: the report in Markdown that is readable as plain text; and what a run did not see."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mla.command.display import markdown
from mla.conformance.report import Cases, CheckResult, ConformanceReport, Status
from mla.text import grouped

# How many wrong cases of a check are listed.
MOST_CASES = 5

_TITLES = ("check", "of", "result", "cases", "error/bound", "note")
_WORDS: dict[Status, str] = {
    "pass": "passed",
    "fail": "failed",
    "refused": "refused",
    "xfail": "failed as expected",
    "xpass": "passed unexpectedly",
    "incomplete": "incomplete",
}


def card(report: ConformanceReport) -> str:
    """Return the report card: Markdown that is readable as plain text."""
    checks = report.checks
    parts = [
        f"# mla conformance: {report.backend.name}\n",
        _header(report),
        markdown(_TITLES, _rows(checks), padded=True),
        _list(
            "Failed", _failures(report), "A command with `--dump-failure DIR` keeps the case's tensors.\n\n"
        ),
        _list("Passed unexpectedly (remove them from the list)", _reasons(checks, "xpass")),
        _list("Failed as expected", _reasons(checks, "xfail")),
        _list("Refused", _refusals(checks)),
        _list("Expected failures that matched no check", report.unused_xfails),
        _list("Drawn", map(_flat, _drawn(checks))),
        _list("What this run cannot have seen", map(_flat, report.blind)),
        f"Seconds: {_seconds(checks)}\n",
        f"{_summary(report)}\n",
    ]
    return "\n".join(part for part in parts if part)


def _summary(report: ConformanceReport) -> str:
    """Return the last line: the number of checks by outcome."""
    counts, checks = report.counts(), report.checks
    told = [status for status in _WORDS if counts[status] or status != "incomplete"]
    listed = ", ".join(f"{counts[status]} {_WORDS[status]}" for status in told)
    cut = f" (interrupted, {report.planned} planned)" if report.interrupted else ""
    count = "1 check" if len(checks) == 1 else f"{len(checks)} checks"
    late = f"; {left}" if (left := left_for_time(checks)) else ""
    return f"{count}{cut}: {listed}; {sum(result.seconds for result in checks):.1f} s{late}"


def _header(report: ConformanceReport) -> str:
    backend = report.backend
    facts = {
        "backend": f"{backend.name} {backend.version or '(not packaged)'}",
        "device": f"{backend.device_name} ({backend.device})",
        "dtypes": ", ".join(report.dtypes),
        **({"run": "quick, a first look"} if report.quick else {}),
        "command": f"`{shlex.join(report.argv)}`",
        "created": report.created,
        **({"commit": report.git_commit} if report.git_commit else {}),
        **report.environment,
    }
    return "".join(f"- {key}: {_flat(value)}\n" for key, value in facts.items())


def _failures(report: ConformanceReport) -> Iterator[str]:
    """Yield every failed check with its wrong cases, and how to run the first of them alone."""
    for result in report.checks:
        if result.status == "fail":
            ran = result.cases.passed + result.cases.refused + result.cases.failed
            only = "the one case that ran" if result.cases.left_out else "its one case"
            of = f"{result.cases.failed} of {ran} cases" if ran > 1 else only
            alone = shlex.join([*report.alone, "--only", result.failures[0].id])
            lines = [f"`{result.id}`: {of}", *failed_cases(result), f"the first alone: `{alone}`"]
            yield "\n  - ".join(lines)


def failed_cases(result: CheckResult) -> list[str]:
    """Return a line for each of the first wrong cases of a check, and one that counts the others."""
    texts = {
        case.id: ": ".join(filter(None, (case.case, case.reason))) for case in result.failures[:MOST_CASES]
    }
    more = len(result.failures) - len(texts)
    return [*(f"`{id}`: {_flat(text)}" for id, text in texts.items()), *([f"and {more} more"] * bool(more))]


def _seconds(checks: Iterable[CheckResult]) -> str:
    """Return what every group of checks took, the longest first."""
    taken: Counter[str] = Counter()
    for result in checks:
        taken[_group(result)] += result.seconds  # type: ignore[assignment]  # a counter takes floats as well
    return ", ".join(f"{group} {seconds:.1f}" for group, seconds in taken.most_common())


def _rows(checks: Iterable[CheckResult]) -> Iterator[tuple[str, ...]]:
    """Yield one row per check and op: the dtypes share it."""
    for (name, of), members in grouped(checks, lambda result: (result.check, result.of)).items():
        ratios = [result.error_ratio for result in members if result.error_ratio is not None]
        ratio = f"{max(ratios):.2g}" if ratios else ""
        note = "; ".join(dict.fromkeys(result.note for result in members if result.note))
        cases = _counted([result.cases for result in members])
        yield tuple(map(_one_line, (name, of or "device", _result(members), cases, ratio, note)))


def _result(members: Sequence[CheckResult]) -> str:
    """Return "pass", or the outcome of each dtype."""
    ends = grouped(
        members, lambda result: result.status.upper() if result.status in ("fail", "xpass") else result.status
    )
    if len(ends) == 1:
        return next(iter(ends))
    return "; ".join(f"{word} {', '.join(result.dtype for result in ended)}" for word, ended in ends.items())


def _counted(members: Sequence[Cases]) -> str:
    """Return how many cases there are, and of them "3 wrong, 2 refused, 4 left out"."""
    words = {"passed": "", "failed": "wrong", "refused": "refused", "left_out": "left out"}
    counts = {word: sum(getattr(result, name) for result in members) for name, word in words.items()}
    extra = [f"{count} {word}" for word, count in counts.items() if word and count]
    return ", ".join([str(sum(counts.values())), *extra])


def _drawn(checks: Iterable[CheckResult]) -> Iterator[str]:
    """Yield a line per check that drew its cases: how many, and what along which axis."""
    for result in checks:
        if (drawn := result.drawn) is not None and drawn.along:
            share = drawn.refused / (drawn.judged + drawn.refused or 1)
            kept = f", {drawn.kept} of earlier failures first" if drawn.kept else ""
            along = "; ".join(f"{axis} {values}" for axis, values in drawn.along.items())
            how = f"seed {drawn.seed}, {drawn.seconds:.0f} s"
            yield f"`{result.id}`: {drawn.judged} judged, {share:.0%} refused{kept} ({how}): {along}"


def _reasons(checks: Iterable[CheckResult], status: Status) -> list[str]:
    return [f"`{result.id}`: {_flat(result.reason)}" for result in checks if result.status == status]


def _refusals(checks: Sequence[CheckResult]) -> Iterator[str]:
    """Yield one line per op and reason: which checks it concerns, "(some)" where other cases were served."""
    pairs = [
        (result, reason)
        for result in checks
        for reason in dict.fromkeys(each.reason for each in result.refusals)
    ]
    for (of, reason), members in grouped(pairs, lambda pair: (pair[0].of, pair[1])).items():
        concerned = ", ".join(_concerned([result for result, _ in members], checks))
        yield f"{f'`{of}`: ' if of else ''}{_flat(reason)}: {concerned}"


def _concerned(members: Sequence[CheckResult], checks: Sequence[CheckResult]) -> Iterator[str]:
    """Yield the names of checks with their dtypes, a group of several that is refused as a whole as one."""

    def key(result: CheckResult) -> tuple[str, str, str]:
        return _group(result), result.of, result.dtype

    sizes = Counter(map(key, checks))
    refused = Counter(key(result) for result in members if result.status == "refused")

    def name(result: CheckResult) -> str:
        if refused[key(result)] == max(2, sizes[key(result)]):
            return f"{_group(result)}.*"
        return result.check if result.status == "refused" else f"{result.check} (some)"

    for named, results in grouped(members, name).items():
        dtypes = ", ".join(filter(None, dict.fromkeys(result.dtype for result in results)))
        yield f"{named} [{dtypes}]" if dtypes else named


def _group(result: CheckResult) -> str:
    return result.check.partition(".")[0]


def _list(title: str, lines: Iterable[str], first: str = "") -> str:
    listed = "".join(f"- {line}\n" for line in lines)
    return f"## {title}\n\n{first}{listed}" if listed else ""


def _flat(text: str) -> str:
    """Return text that cannot break a list of Markdown: one line, no bars."""
    return _one_line(text).replace("|", "\\|")


def _one_line(text: str) -> str:
    return " ".join(str(text).split())


# ------------------------------------------------------------------------- what is unseen

# What no run of this suite sees.
_ALWAYS = (
    "Sizes that were not drawn: most are near the borders that kernels usually have, and few are large.",
    "Races that need luck: a case runs once or a few times, on one stream of one process.",
    "One more rounding to a narrow dtype in a small op, of angles, of a norm before its weight, of a product "
    "before its bias: it costs about as much as rounding the output, which is allowed.",
    "Speed: nothing is timed but whether the device waits and its clock tells the truth.",
    "Several devices, and what `probe()` does to a device: it is set up before the first check.",
)


@dataclass(frozen=True)
class Extent:
    """How far a run went."""

    quick: bool
    only: Sequence[str]  # patterns; empty: every check
    claimed: Sequence[str]  # dtypes
    checked: Sequence[str]
    planned: int  # checks


def blind(extent: Extent, checks: Sequence[CheckResult]) -> list[str]:
    """Return what a run cannot have seen, one sentence each; what depends on the run comes first."""
    cut = [*_cut(extent, checks), *_few(checks), *_late(checks), *_idle(extent, checks)]
    return [*cut, *_reached(checks), *_all_refused(checks), *_other_dtypes(extent), *_ALWAYS]


def _cut(extent: Extent, checks: Sequence[CheckResult]) -> Iterator[str]:
    if len(checks) < extent.planned:
        missing = extent.planned - len(checks)
        yield f"What {missing} of {extent.planned} checks ask: the run ended before them."
    if extent.only:
        yield f"What other checks ask: only {', '.join(extent.only)} ran."
    if extent.quick:
        yield "What more draws would find: --quick has few of them."


def _few(checks: Sequence[CheckResult]) -> Iterator[str]:
    few = [result.id for result in checks if result.status == "incomplete"]
    if few:
        yield f"What more draws would find: too few of {', '.join(few)} (--minutes or --draws gives more)."


def left_for_time(checks: Iterable[CheckResult]) -> str:
    """Return how many fixed cases time was too short for, as a clause; empty if there are none."""
    count = sum(result.late for result in checks)
    return f"{_fixed(count)} left out as time was up" if count else ""


def _fixed(count: int) -> str:
    return "1 fixed case" if count == 1 else f"{count} fixed cases"


def _late(checks: Sequence[CheckResult]) -> Iterator[str]:
    late = [result for result in checks if result.late]
    if late:
        names = ", ".join(dict.fromkeys(map(_group, late)))
        cases = _fixed(sum(result.late for result in late))
        yield f"{cases} of {names}: time was up before them (--minutes gives more)."


def _idle(extent: Extent, checks: Sequence[CheckResult]) -> Iterator[str]:
    if not extent.only and any(check.of not in ("", "auto", "reference") for check in checks):
        yield "The reference on the device, where an op serves most layers (--only '*[reference-*' runs it)."


def _reached(checks: Sequence[CheckResult]) -> Iterator[str]:
    """Say how far checks of index widths got, as memory allowed."""
    members = [result for result in checks if result.kind == "index" and result.note and result.cases.passed]
    for check in dict.fromkeys(result.check for result in members):
        notes = dict.fromkeys(result.note for result in members if result.check == check)
        yield f"Indices beyond what {check} reached: {', '.join(notes)}."


def _all_refused(checks: Sequence[CheckResult]) -> Iterator[str]:
    """Say which ops refused a dtype as a whole, and which kinds of failure in what they serve."""
    served: dict[tuple[str, str], dict[str, bool]] = {}
    for result in checks:
        kinds = served.setdefault((result.dtype, result.of or "the device"), {})
        kinds[result.kind] = kinds.get(result.kind, False) or result.status != "refused"
    subjects: dict[tuple[str, str], list[str]] = {}
    for (dtype, of), kinds in served.items():
        none = [kind for kind, some in kinds.items() if not some]
        if none:
            what = "Anything" if len(none) == len(kinds) else f"What fails by {' or '.join(none)}"
            subjects.setdefault((what, f" in {dtype}" if dtype else ""), []).append(of)
    for (what, where), names in subjects.items():
        yield f"{what}{where} of {', '.join(names)}: all of it was refused."


def _other_dtypes(extent: Extent) -> Iterator[str]:
    unchecked = [dtype for dtype in extent.claimed if dtype not in extent.checked]
    if unchecked:
        yield f"{' and '.join(unchecked)}: claimed, and not asked for."
    yield f"Other dtypes than {', '.join(extent.claimed)}: the backend claims no others."
