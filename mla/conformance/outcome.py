"""What a run comes to: its report, with all it depends on, and the exit code."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

from mla.command import environment
from mla.command.exit_codes import Exit
from mla.command.exit_codes import interrupted as ended_early
from mla.conformance.report import SCHEMA_VERSION, CheckedBackend, CheckResult, ConformanceReport, Slow
from mla.conformance.report.coverage import Extent, blind, coverage
from mla.conformance.trial import BackendUnderTest
from mla.conformance.xfails import Xfails
from mla_backends.errors import plugin_code

PROGRAM = ("python", "-m", "mla.conformance")


@dataclass(frozen=True)
class Asked:
    """What the command line asked for."""

    words: Sequence[str]
    alone: Sequence[str]  # that run one case, without its `--only`
    only: Sequence[str]
    claimed: Sequence[str]  # dtypes
    dtypes: Sequence[str]  # that are checked
    planned: int  # checks


def make_report(
    asked: Asked,
    slow: Sequence[Slow],
    subject: BackendUnderTest,
    found: list[CheckResult],
    interrupted: bool,
    xfails: Xfails,
) -> ConformanceReport:
    """Put the results together with what they depend on."""
    extent = Extent(subject.quick, asked.only, asked.claimed, asked.dtypes, slow, asked.planned)
    return ConformanceReport(
        schema_version=SCHEMA_VERSION,
        argv=[*PROGRAM, *asked.words],
        alone=list(asked.alone),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        git_commit=environment.git_commit(),
        interrupted=interrupted,
        quick=subject.quick,
        backend=_checked(subject),
        environment=_environment(subject),
        dtypes=list(asked.dtypes),
        slow=list(slow),
        planned=asked.planned,
        checks=found,
        unused_xfails=xfails.unused(),
        coverage=coverage(found),
        blind=blind(extent, found),
    )


def _checked(subject: BackendUnderTest) -> CheckedBackend:
    return CheckedBackend(
        name=subject.name,
        version=subject.version,
        device=str(subject.backend.device),
        device_name=_device_name(subject),
    )


def _device_name(subject: BackendUnderTest) -> str:
    try:
        with plugin_code():
            return str(subject.backend.device_info().name)
    except Exception:  # noqa: BLE001  # device.info reports it; the card must come out all the same
        return "unknown"


def _environment(subject: BackendUnderTest) -> dict[str, str]:
    try:
        with plugin_code():
            return environment.environment(subject.backend)
    except Exception as error:  # noqa: BLE001  # device.environment reports it
        return {"environment": f"unknown: {type(error).__name__}"}


def verdict(report: ConformanceReport) -> Exit:
    """Return the exit code."""
    counts = report.counts()
    if report.interrupted:
        return ended_early()
    if counts["fail"]:
        return Exit.WRONG
    if counts["xpass"]:
        return Exit.REGRESSION
    return Exit.OK if counts["pass"] + counts["xfail"] else Exit.NOTHING_RAN
