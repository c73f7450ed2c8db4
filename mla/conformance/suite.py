"""Which checks run on a backend, and the outcome of each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from mla.conformance.registry import DEVICE, DTYPE, LAYER, OP, ConformanceCheck, all_checks, matches
from mla.conformance.report import Cases, CheckResult, Refusal, Status
from mla.conformance.trial import DTYPES, BackendUnderTest, Trial
from mla.conformance.xfails import Xfails
from mla.reference import REFERENCE
from mla.text import dtype_name
from mla_backends.api import FusedOp
from mla_backends.errors import plugin_code


@dataclass(frozen=True)
class Instance:
    """A check of one subject: the device, a dtype, an op in a dtype, or a layer in a dtype."""

    check: ConformanceCheck
    of: str = ""  # op or policy
    dtype: torch.dtype | None = None
    op: FusedOp | None = None

    @property
    def subject(self) -> str:
        """What stands in brackets behind the check's id."""
        return "-".join(filter(None, (self.of, dtype_name(self.dtype) if self.dtype else "")))

    @property
    def id(self) -> str:
        return f"{self.check.id}[{self.subject}]" if self.subject else self.check.id

    def run(self, subject: BackendUnderTest) -> Trial:
        """Run the check. Raises nothing but KeyboardInterrupt."""
        trial = Trial(
            subject,
            dtype=self.dtype or torch.float32,
            op=self.op,
            name=self.of,
            kind=self.check.kind,
            policy=self.of if self.check.scope == LAYER else "auto",
            may_refuse=self.check.scope in (OP, LAYER),
        )
        whole = Trial(subject)
        with whole.case():
            self.check.run(trial)
        if whole.failed or whole.refused or not trial.count:  # a check without cases is one case
            trial.passed += whole.passed
            trial.failed += whole.failed
            trial.refused += whole.refused
        return trial


def claimed_dtypes(subject: BackendUnderTest) -> tuple[torch.dtype, ...]:
    """Return the dtypes of a layer that the backend claims; float32 if it claims none."""
    claimed = _claimed(subject)
    return tuple(dtype for dtype in DTYPES if dtype in claimed) or (torch.float32,)


def _claimed(subject: BackendUnderTest) -> list[torch.dtype]:
    try:
        with plugin_code():
            found = list(subject.backend.dtypes())
    except Exception:  # noqa: BLE001  # the check of dtypes reports it
        return []
    return [one for one in found if isinstance(one, torch.dtype) and one.is_floating_point]


def instances(
    subject: BackendUnderTest, dtypes: Sequence[torch.dtype], only: Sequence[str] = ()
) -> tuple[Instance, ...]:
    """Return what runs on this backend, in order; `only` keeps what matches any of its patterns."""
    offered = _offered(subject)
    found = (one for check in all_checks() for one in _of_check(check, subject, dtypes, offered))
    return tuple(
        one for one in found if not only or any(matches(word, one.check.id, one.subject) for word in only)
    )


def _of_check(
    check: ConformanceCheck,
    subject: BackendUnderTest,
    dtypes: Sequence[torch.dtype],
    offered: Mapping[str, FusedOp],
) -> Iterator[Instance]:
    if check.scope == DEVICE:
        yield Instance(check)
        return
    if check.scope == DTYPE:
        more = [
            dtype for dtype in _claimed(subject) if dtype not in DTYPES
        ]  # no layer has them, but they are claimed
        yield from (Instance(check, dtype=dtype) for dtype in (*dtypes, *more))
        return
    for dtype in dtypes:
        if check.scope == OP:
            for name, op in _implementations(offered, check.kind):
                yield Instance(check, name, dtype, op)
        else:
            for policy in _policies(subject, offered):
                yield Instance(check, policy, dtype)


def _offered(subject: BackendUnderTest) -> dict[str, FusedOp]:
    try:
        with plugin_code():
            offered = dict(subject.backend.ops())
    except Exception:  # noqa: BLE001  # the checks of ops report it
        return {}
    return {str(name): op for name, op in offered.items() if isinstance(op, FusedOp)}


def _implementations(offered: Mapping[str, FusedOp], kind: str) -> Iterator[tuple[str, FusedOp]]:
    """Yield what the backend offers for a kind of op, and the reference, which serves what ops refuse."""
    for name, op in offered.items():
        if str(getattr(op, "contract", "")).partition("/")[0] == kind:
            yield name, op
    yield "reference", REFERENCE[kind]


def _policies(subject: BackendUnderTest, offered: Mapping[str, FusedOp]) -> tuple[str, ...]:
    """Return the ops a layer is built with; without fused ops both policies are the same."""
    return ("auto", "reference") if offered and not subject.quick else ("auto",)


def carry_out(instance: Instance, subject: BackendUnderTest, xfails: Xfails) -> CheckResult:
    """Run one check and classify its outcome."""
    start = time.perf_counter()
    trial = instance.run(subject)
    status, reason = _verdict(instance, trial, xfails)
    return CheckResult(
        id=instance.id,
        check=instance.check.id,
        of=instance.of,
        dtype=dtype_name(instance.dtype) if instance.dtype else "",
        status=status,
        reason=reason,
        cases=Cases(passed=trial.passed, refused=len(trial.refused), failed=len(trial.failed)),
        refusals=[Refusal(case=case, reason=reason) for case, reason in trial.refused],
        error_ratio=trial.worst,
        note=trial.note,
        seconds=round(time.perf_counter() - start, 4),
    )


def _verdict(instance: Instance, trial: Trial, xfails: Xfails) -> tuple[Status, str]:
    expected = xfails.reason(instance.check.id, instance.subject)
    if trial.failed:
        reason = _summary(trial)
        return ("fail", reason) if expected is None else ("xfail", f"{expected} ({reason})")
    if not trial.passed:
        return "refused", "; ".join(dict.fromkeys(reason for _, reason in trial.refused))
    return ("pass", "") if expected is None else ("xpass", expected)


def _summary(trial: Trial) -> str:
    """Return the first failure, and how many there are."""
    count = len(trial.failed)
    return trial.failed[0] if trial.count == 1 else f"{count} of {trial.count} cases; {trial.failed[0]}"
