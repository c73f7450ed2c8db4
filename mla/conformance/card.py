"""The card: the report in Markdown that is readable as plain text; and what a run did not see."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence

from mla.command.display import markdown
from mla.conformance.report import CheckResult, ConformanceReport, Status
from mla.text import counted, grouped

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
    late = sum(result.late for result in checks)
    left = f"; {counted(late, 'fixed case')} left out as time was up" if late else ""
    seconds = sum(result.seconds for result in checks)
    return f"{counted(len(checks), 'check')}{cut}: {listed}; {seconds:.1f} s{left}"


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
    lines = [f"`{case.id}`: {_flat(str(case))}" for case in result.failures[:MOST_CASES]]
    more = len(result.failures) - len(lines)
    return lines + [f"and {more} more"] * bool(more)


def _seconds(checks: Iterable[CheckResult]) -> str:
    """Return what every group of checks took, the longest first."""
    taken = {
        group: sum(result.seconds for result in members) for group, members in grouped(checks, _group).items()
    }
    longest = sorted(taken.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{group} {seconds:.1f}" for group, seconds in longest)


def _rows(checks: Iterable[CheckResult]) -> Iterator[tuple[str, ...]]:
    """Yield one row per check and op: the dtypes share it."""
    for (name, of), members in grouped(checks, lambda result: (result.check, result.of)).items():
        ratios = [result.error_ratio for result in members if result.error_ratio is not None]
        ratio = f"{max(ratios):.2g}" if ratios else ""
        note = "; ".join(dict.fromkeys(result.note for result in members if result.note))
        yield tuple(map(_one_line, (name, of or "device", _result(members), _cases(members), ratio, note)))


def _result(members: Sequence[CheckResult]) -> str:
    """Return "pass", or the outcome of each dtype."""
    ends = grouped(
        members, lambda result: result.status.upper() if result.status in ("fail", "xpass") else result.status
    )
    if len(ends) == 1:
        return next(iter(ends))
    return "; ".join(f"{word} {', '.join(result.dtype for result in ended)}" for word, ended in ends.items())


def _cases(members: Sequence[CheckResult]) -> str:
    """Return how many cases there are, and of them "3 wrong, 2 refused, 4 left out"."""
    words = {"passed": "", "failed": "wrong", "refused": "refused", "left_out": "left out"}
    counts = {word: sum(getattr(result.cases, name) for result in members) for name, word in words.items()}
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
    for (of, reason), concerned in grouped(pairs, lambda pair: (pair[0].of, pair[1])).items():
        names = ", ".join(_concerned([result for result, _ in concerned], checks))
        yield f"{f'`{of}`: ' if of else ''}{_flat(reason)}: {names}"


def _concerned(members: Sequence[CheckResult], checks: Sequence[CheckResult]) -> Iterator[str]:
    """Yield the names of checks with their dtypes, a group of several that is refused as a whole as one."""

    def of_group(result: CheckResult, among: Iterable[CheckResult]) -> int:
        alike = _group(result), result.of, result.dtype
        return sum((_group(other), other.of, other.dtype) == alike for other in among)

    refused = [result for result in members if result.status == "refused"]

    def name(result: CheckResult) -> str:
        if of_group(result, refused) == max(2, of_group(result, checks)):
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


def blind(
    checks: Sequence[CheckResult],
    planned: int,  # checks
    quick: bool = False,
    only: Sequence[str] = (),  # patterns; empty: every check
    claimed: Sequence[str] = (),  # dtypes
    asked: Sequence[str] = (),  # dtypes
) -> Iterator[str]:
    """Yield what a run cannot have seen, one sentence each; what depends on the run comes first."""
    if len(checks) < planned:
        yield f"What {planned - len(checks)} of {planned} checks ask: the run ended before them."
    if only:
        yield f"What other checks ask: only {', '.join(only)} ran."
    if quick:
        yield "What more draws would find: --quick has few of them."
    if few := ", ".join(result.id for result in checks if result.status == "incomplete"):
        yield f"What more draws would find: too few of {few} (--minutes or --draws gives more)."
    if late := [result for result in checks if result.late]:
        cases = counted(sum(result.late for result in late), "fixed case")
        groups = ", ".join(dict.fromkeys(map(_group, late)))
        yield f"{cases} of {groups}: time was up before them (--minutes gives more)."
    if not only and any(result.of not in ("", "auto", "reference") for result in checks):
        yield "The reference on the device, where an op serves most layers (--only '*[reference-*' runs it)."
    reached = [result for result in checks if result.kind == "index" and result.note and result.cases.passed]
    for check, members in grouped(reached, lambda result: result.check).items():
        notes = ", ".join(dict.fromkeys(result.note for result in members))
        yield f"Indices beyond what {check} reached: {notes}."
    yield from _all_refused(checks)
    if unasked := [dtype for dtype in claimed if dtype not in asked]:
        yield f"{' and '.join(unasked)}: claimed, and not asked for."
    yield f"Other dtypes than {', '.join(claimed)}: the backend claims no others."
    yield from _ALWAYS


def _all_refused(checks: Sequence[CheckResult]) -> Iterator[str]:
    """Say which ops refused a dtype as a whole, and which kinds of failure in what they serve."""
    subjects: dict[tuple[str, str], list[str]] = {}
    for (dtype, of), members in grouped(checks, lambda result: (result.dtype, result.of)).items():
        kinds = {result.kind for result in members}
        refused = kinds - {result.kind for result in members if result.status != "refused"}
        what = f"What fails by {' or '.join(sorted(refused))}" if refused < kinds else "Anything"
        if refused:
            where = f" in {dtype}" if dtype else ""
            subjects.setdefault((what, where), []).append(of or "the device")
    for (what, where), names in subjects.items():
        yield f"{what}{where} of {', '.join(names)}: all of it was refused."
