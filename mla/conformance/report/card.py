"""The card: the report in Markdown that is readable as plain text."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

from mla.command.table import markdown
from mla.conformance.report.schema import (
    Cases,
    CheckResult,
    ConformanceReport,
    Coverage,
    Failure,
    Status,
)

# How many wrong cases of a check are listed.
MOST_CASES = 5

_TITLES = ("check", "of", "result", "cases", "error/bound", "note")
_KIND_TITLES = ("kind", "checks", "cases", "what it is")
_SECTIONS: dict[Status, str] = {
    "xpass": "Passed unexpectedly (remove them from the list)",
    "xfail": "Failed as expected",
}


def card(report: ConformanceReport) -> str:
    """Return the report card: Markdown that is readable as plain text."""
    parts = [
        f"# mla conformance: {report.backend.name}\n",
        _header(report),
        _table(report.checks),
        _list(
            "Failed", list(_failures(report)), "A command with `--dump-failure DIR` keeps the case's tensors."
        ),
        *(_section(title, status, report.checks) for status, title in _SECTIONS.items()),
        _list("Refused", list(_refusals(report.checks))),
        _list("Expected failures that matched no check", report.unused_xfails),
        "## Covered, by why kernels fail\n",
        markdown(_KIND_TITLES, map(_kind, report.coverage), padded=True),
        _list("What this run cannot have seen", list(map(_flat, report.blind))),
        f"Seconds: {seconds_by_group(report.checks)}\n",
        summary(report) + "\n",
    ]
    return "\n".join(part for part in parts if part)


def summary(report: ConformanceReport) -> str:
    """Return the last line: the number of checks by outcome."""
    counts, seconds = report.counts(), sum(one.seconds for one in report.checks)
    words = {
        "pass": "passed",
        "fail": "failed",
        "refused": "refused",
        "xfail": "failed as expected",
        "xpass": "passed unexpectedly",
    }
    listed = ", ".join(f"{counts[cast('Status', status)]} {word}" for status, word in words.items())
    cut = f" (interrupted, {report.planned} planned)" if report.interrupted else ""
    checks = "1 check" if len(report.checks) == 1 else f"{len(report.checks)} checks"
    return f"{checks}{cut}: {listed}; {seconds:.1f} s"


def _header(report: ConformanceReport) -> str:
    backend = report.backend
    facts = {
        "backend": f"{backend.name} {backend.version or '(not packaged)'}",
        "device": f"{backend.device_name} ({backend.device})",
        "dtypes": ", ".join(report.dtypes),
        "grid": "quick" if report.quick else "full",
        "command": f"`{shlex.join(report.argv)}`",
        "created": report.created,
        **({"commit": report.git_commit} if report.git_commit else {}),
        **report.environment,
    }
    return "".join(f"- {key}: {_flat(value)}\n" for key, value in facts.items())


def _kind(one: Coverage) -> tuple[str, ...]:
    return one.kind, str(one.checks), _counted([one.cases]), one.what


def _failures(report: ConformanceReport) -> Iterator[str]:
    """Yield every failed check with its wrong cases, and how to run the first of them alone."""
    for one in report.checks:
        if one.status != "fail":
            continue
        lines = [*failed_cases(one), _alone(report, one.failures[0])]
        yield f"`{one.id}`: {_of_cases(one)}\n" + "\n".join(f"  - {line}" for line in lines)


def _of_cases(one: CheckResult) -> str:
    ran = one.cases.passed + one.cases.refused + one.cases.failed
    return f"{one.cases.failed} of {ran} cases" if ran > 1 else "its one case"


def failed_cases(one: CheckResult) -> list[str]:
    """Return a line for each of the first wrong cases of a check, and one that counts the others."""
    lines = [f"`{case.id}`: {_flat(_text(case))}" for case in one.failures[:MOST_CASES]]
    more = len(one.failures) - len(lines)
    return [*lines, f"and {more} more"] if more else lines


def _text(case: Failure) -> str:
    return ": ".join(filter(None, (case.case, case.reason)))


def _alone(report: ConformanceReport, case: Failure) -> str:
    """Return how to run one case and nothing else."""
    return f"the first alone: `{shlex.join([*report.alone, '--only', case.id])}`"


def seconds_by_group(checks: Iterable[CheckResult]) -> str:
    """Return what every group of checks took, the longest first."""
    taken: dict[str, float] = {}
    for one in checks:
        group = one.check.partition(".")[0]
        taken[group] = taken.get(group, 0.0) + one.seconds
    longest = sorted(taken, key=taken.__getitem__, reverse=True)
    return ", ".join(f"{group} {taken[group]:.1f}" for group in longest)


def _table(checks: Sequence[CheckResult]) -> str:
    return markdown(_TITLES, _rows(checks), padded=True)


def _rows(checks: Iterable[CheckResult]) -> Iterator[tuple[str, ...]]:
    """Yield one row per check and op: the dtypes share it."""
    groups: dict[tuple[str, str], list[CheckResult]] = {}
    for one in checks:
        groups.setdefault((one.check, one.of), []).append(one)
    for (name, of), members in groups.items():
        yield tuple(
            map(
                _one_line,
                (name, of or "device", _result(members), _cases(members), _ratio(members), _note(members)),
            )
        )


def _result(members: Sequence[CheckResult]) -> str:
    """Return "pass", or the outcome of each dtype."""
    by_status: dict[str, list[str]] = {}
    for one in members:
        word = one.status.upper() if one.status in ("fail", "xpass") else one.status
        by_status.setdefault(word, []).append(one.dtype)
    if len(by_status) == 1:
        return next(iter(by_status))
    return "; ".join(f"{word} {', '.join(dtypes)}" for word, dtypes in by_status.items())


def _cases(members: Sequence[CheckResult]) -> str:
    return _counted([one.cases for one in members])


def _counted(members: Sequence[Cases]) -> str:
    """Return how many cases there are, and of them "3 wrong, 2 refused, 4 left out"."""
    words = {"passed": "", "failed": "wrong", "refused": "refused", "left_out": "left out"}
    counts = {word: sum(getattr(one, name) for one in members) for name, word in words.items()}
    extra = [f"{count} {word}" for word, count in counts.items() if word and count]
    return ", ".join([str(sum(counts.values())), *extra])


def _ratio(members: Sequence[CheckResult]) -> str:
    ratios = [one.error_ratio for one in members if one.error_ratio is not None]
    return f"{max(ratios):.2g}" if ratios else ""


def _note(members: Sequence[CheckResult]) -> str:
    return "; ".join(dict.fromkeys(one.note for one in members if one.note))


def _section(title: str, status: Status, checks: Iterable[CheckResult]) -> str:
    return _list(title, [f"`{one.id}`: {_flat(one.reason)}" for one in checks if one.status == status])


def _refusals(checks: Sequence[CheckResult]) -> Iterator[str]:
    """Yield one line per op and reason: which checks it concerns, "(some)" where other cases were served."""
    groups: dict[tuple[str, str], list[CheckResult]] = {}
    for one in checks:
        for reason in dict.fromkeys(refusal.reason for refusal in one.refusals):
            groups.setdefault((one.of, reason), []).append(one)
    for (of, reason), members in groups.items():
        yield f"{f'`{of}`: ' if of else ''}{_flat(reason)}: {', '.join(_concerned(members, checks))}"


def _concerned(members: Sequence[CheckResult], checks: Sequence[CheckResult]) -> Iterator[str]:
    """Yield the names of checks with their dtypes, a group that is refused as a whole as one."""
    whole = {key for key in map(_group, members) if _refused(key, members) == _count(key, checks)}
    names: dict[str, list[str]] = {}
    for one in members:
        some = " (some)" if one.status != "refused" else ""
        name = f"{one.check.partition('.')[0]}.*" if _group(one) in whole else f"{one.check}{some}"
        names.setdefault(name, []).append(one.dtype)
    for name, dtypes in names.items():
        listed = ", ".join(filter(None, dict.fromkeys(dtypes)))
        yield f"{name} [{listed}]" if listed else name


def _group(one: CheckResult) -> tuple[str, str, str]:
    return one.check.partition(".")[0], one.of, one.dtype


def _refused(key: tuple[str, str, str], members: Sequence[CheckResult]) -> int:
    return sum(_group(one) == key and one.status == "refused" for one in members)


def _count(key: tuple[str, str, str], checks: Sequence[CheckResult]) -> int:
    """Return how many checks a group has, at least two: one alone is named in full."""
    return max(2, sum(_group(one) == key for one in checks))


def _list(title: str, lines: Sequence[str], first: str = "") -> str:
    if not lines:
        return ""
    above = f"{first}\n\n" * bool(first)
    return f"## {title}\n\n{above}" + "".join(f"- {line}\n" for line in lines)


def _flat(text: str) -> str:
    """Return text that cannot break a list of Markdown: one line, no bars."""
    return _one_line(text).replace("|", "\\|")


def _one_line(text: str) -> str:
    return " ".join(str(text).split())
