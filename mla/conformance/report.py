"""The report: one schema, validated on write and on read, and the card that is printed from it."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, cast

import msgspec

from mla.command.files import write_bytes
from mla.command.table import markdown
from mla.errors import MLAError

SCHEMA_VERSION = 1

Status = Literal["pass", "fail", "refused", "xfail", "xpass"]


class ConformanceReportError(MLAError):
    """A report that cannot be read."""


class Cases(msgspec.Struct, kw_only=True):
    """Number of cases of a check by outcome."""

    passed: int
    refused: int
    failed: int


class Refusal(msgspec.Struct, kw_only=True):
    """A case that was not served, and the op's reasons."""

    case: str
    reason: str


class CheckResult(msgspec.Struct, kw_only=True):
    """One check of one subject.

    refused: the backend declared beforehand that it serves none of the cases. xfail: it failed, as the list
    of expected failures says. xpass: the list says it fails, but it passed.
    """

    id: str  # check, and the subject in brackets
    check: str
    of: str  # op, or the policy of a layer's ops; "" for the device
    dtype: str  # "" where it does not matter
    status: Status
    reason: str
    cases: Cases
    refusals: list[Refusal]
    error_ratio: float | None  # largest error over its bound; at most 1 when right
    note: str
    seconds: float


class CheckedBackend(msgspec.Struct, kw_only=True):
    """What was checked."""

    name: str
    version: str | None
    device: str  # torch's name for it
    device_name: str


class ConformanceReport(msgspec.Struct, kw_only=True):
    """One run of the suite."""

    schema_version: int
    argv: list[str]
    created: str  # ISO 8601, UTC
    git_commit: str | None
    interrupted: bool
    quick: bool
    backend: CheckedBackend
    environment: dict[str, str]
    dtypes: list[str]
    planned: int  # checks, of which `checks` holds those that ran
    checks: list[CheckResult]
    unused_xfails: list[str]  # patterns of the list that matched nothing that ran

    def counts(self) -> Counter[Status]:
        """Return status -> number of checks."""
        return Counter(one.status for one in self.checks)


def decode(data: bytes) -> ConformanceReport:
    """Parse and validate a report. Raises `ConformanceReportError` with the JSON path of the fault."""
    try:
        report = msgspec.json.decode(data, type=ConformanceReport)
    except msgspec.DecodeError as error:
        raise ConformanceReportError(f"not a conformance report of this version: {error}.") from error
    if report.schema_version != SCHEMA_VERSION:
        raise ConformanceReportError(
            f"the report has schema version {report.schema_version}, not {SCHEMA_VERSION}."
        )
    return report


def write(report: ConformanceReport, path: Path) -> None:
    """Write a report whole or not at all. Raises `mla.errors.ResultError`."""
    write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n", path)


# ------------------------------------------------------------------------------------------------ card

_TITLES = ("check", "of", "result", "cases", "error/bound", "note")
_SECTIONS: dict[Status, str] = {
    "fail": "Failed",
    "xpass": "Passed unexpectedly (remove them from the list)",
    "xfail": "Failed as expected",
}


def card(report: ConformanceReport) -> str:
    """Return the report card: Markdown that is readable as plain text."""
    parts = [
        f"# mla conformance: {report.backend.name}\n",
        _header(report),
        _table(report.checks),
        *(_section(title, status, report.checks) for status, title in _SECTIONS.items()),
        _list("Refused", list(_refusals(report.checks))),
        _list("Expected failures that matched no check", report.unused_xfails),
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
    return f"{len(report.checks)} checks{cut}: {listed}; {seconds:.1f} s"


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
    passed, refused, failed = (
        sum(getattr(one.cases, kind) for one in members) for kind in ("passed", "refused", "failed")
    )
    total = passed + refused + failed
    extra = [f"{count} {word}" for count, word in ((failed, "wrong"), (refused, "refused")) if count]
    return f"{total}, {', '.join(extra)}" if extra else str(total)


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


def _list(title: str, lines: Sequence[str]) -> str:
    return f"## {title}\n\n" + "".join(f"- {line}\n" for line in lines) if lines else ""


def _flat(text: str) -> str:
    """Return text that cannot break a list of Markdown: one line, no bars."""
    return _one_line(text).replace("|", "\\|")


def _one_line(text: str) -> str:
    return " ".join(str(text).split())
