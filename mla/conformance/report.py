"""The report of a run: one schema."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import msgspec

SCHEMA_VERSION = 3

Status = Literal["pass", "incomplete", "fail", "refused", "xfail", "xpass"]


class Cases(msgspec.Struct, kw_only=True):
    """Number of cases of a check by outcome."""

    passed: int
    refused: int
    failed: int
    left_out: int  # because time was up, or only others were asked for


class Failure(msgspec.Struct):
    """A case that is wrong."""

    id: str  # as `--only` takes it; that of the check if the check itself failed, outside of its cases
    case: str
    reason: str

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.case, self.reason)))


class Refusal(msgspec.Struct):
    """A case that was not served, and the op's reasons."""

    case: str
    reason: str


class Drawn(msgspec.Struct, kw_only=True):
    """What was drawn for one op in one dtype."""

    judged: int  # draws whose calls were compared with the truth, those of `kept` apart
    refused: int  # draws that the op refused
    kept: int  # failures of earlier runs that came first
    seed: int
    seconds: float  # that it drew for, without those of shrinking
    along: dict[str, str]  # axis -> what was drawn along it


class CheckResult(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One check of one subject.

    incomplete: all that was drawn is right, but too few cases were.

    refused: the backend declared beforehand that it serves none of the cases. xfail: it failed, as the list
    of expected failures says. xpass: the list says it fails, but it passed.
    """

    id: str  # check, and the subject in brackets
    check: str
    kind: str  # why kernels fail it: a key of `mla.conformance.registry.KINDS`
    of: str  # op, or the policy of a layer's ops; "" for the device
    dtype: str  # "" where it does not matter
    status: Status
    reason: str
    cases: Cases
    failures: list[Failure]
    refusals: list[Refusal]
    error_ratio: float | None  # largest error over its bound; at most 1 when right
    note: str
    seconds: float
    drawn: Drawn | None = None  # of a check whose cases are drawn
    late: int = 0  # cases left out because time was up


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
    alone: list[str]  # the command that runs one case, without its `--only`
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
    blind: list[str]  # what this run cannot have seen, one sentence each

    def counts(self) -> Counter[Status]:
        """Return status -> number of checks."""
        return Counter(result.status for result in self.checks)
