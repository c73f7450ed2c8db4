"""Which checks run on a backend, and the outcome of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from mla.conformance.registry import DEVICE, DTYPE, LAYER, OP, ConformanceCheck, all_checks
from mla.conformance.report import Cases, CheckResult, Failure, Refusal, Status
from mla.conformance.selection import Numbers, case_id, chosen_cases
from mla.conformance.trial import DTYPES, BackendUnderTest, Case, Trial
from mla.conformance.xfails import Xfails
from mla.reference import REFERENCE
from mla.text import dtype_name
from mla_backends.api import FusedOp
from mla_backends.errors import plugin_code

# How many cases of a check run in a dtype that the device is slow in, on the quick grid and on the full one.
HANDFUL = {True: 2, False: 3}


@dataclass(frozen=True)
class Instance:
    """A check of one subject: the device, a dtype, an op in a dtype, or a layer in a dtype."""

    check: ConformanceCheck
    of: str = ""  # op or policy
    dtype: torch.dtype | None = None
    op: FusedOp | None = None
    chosen: Numbers = None  # of its cases; None: all

    @property
    def subject(self) -> str:
        """What stands in brackets behind the check's id."""
        return "-".join(filter(None, (self.of, dtype_name(self.dtype) if self.dtype else "")))

    @property
    def id(self) -> str:
        return f"{self.check.id}[{self.subject}]" if self.subject else self.check.id

    def run(self, subject: BackendUnderTest, beat: Callable[[], None] = lambda: None) -> Trial:
        """Run the check. Raises nothing but KeyboardInterrupt."""
        trial = Trial(
            subject,
            dtype=self.dtype or torch.float32,
            op=self.op,
            name=self.of,
            kind=self.check.kind,
            policy=self.of if self.check.scope == LAYER else "auto",
            may_refuse=self.check.scope in (OP, LAYER),
            chosen=self.chosen,
            beat=beat,
        )
        whole = Trial(subject)
        with whole.case():
            self.check.run(trial)
        if whole.cases[0].outcome != "passed" or not trial.labels:  # a check without cases is one case
            trial.cases.append(replace(whole.cases[0], number=0))
        return trial

    def labels(self, subject: BackendUnderTest) -> tuple[str, ...]:
        """Return the labels of all its cases, of which none runs; empty for a check without cases."""
        return tuple(replace(self, chosen=frozenset()).run(subject).labels)

    def spared(self, subject: BackendUnderTest) -> Instance:
        """Return it with a handful of its cases, if nobody chose any and the device is slow in its dtype.

        An op that serves no other dtype keeps them all: nothing else would tell what it does in them.
        """
        if self.chosen is not None or self.dtype not in subject.slow or self.check.scope == DTYPE:
            return self
        if self.op is not None and not serves_another(self.op, subject):
            return self
        return replace(self, chosen=handful(len(self.labels(subject)), HANDFUL[subject.quick]))


def serves_another(op: FusedOp, subject: BackendUnderTest) -> bool:
    """Return whether an op serves a dtype that the device is not slow in."""
    from mla.conformance.checks.contract import specs  # here, as checks run in the order of their import

    try:
        with plugin_code():
            fast = (spec for spec in specs(op, subject) if spec.dtype not in subject.slow)
            return any(not op.unsupported_reasons(spec) for spec in fast)
    except Exception:  # noqa: BLE001  # the check of reasons reports it
        return True


def handful(count: int, few: int) -> Numbers:
    """Return the numbers of `few` of `count` cases, the first and the last among them; None: all."""
    if count <= few:
        return None
    return frozenset(1 + round(step * (count - 1) / (few - 1)) for step in range(few))


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
    kept = ((one, chosen_cases(only, one.check.id, one.subject)) for one in found)
    return tuple(replace(one, chosen=numbers) for one, numbers in kept if numbers != frozenset())


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


def carry_out(
    instance: Instance, subject: BackendUnderTest, xfails: Xfails, beat: Callable[[], None] = lambda: None
) -> CheckResult:
    """Run one check and classify its outcome; `beat` is called after every case."""
    start = time.perf_counter()
    trial = instance.spared(subject).run(subject, beat)
    status, reason = _verdict(instance, trial, xfails)
    return CheckResult(
        id=instance.id,
        check=instance.check.id,
        kind=instance.check.fails,
        of=instance.of,
        dtype=dtype_name(instance.dtype) if instance.dtype else "",
        status=status,
        reason=reason,
        cases=_counts(trial),
        failures=[_failure(instance, one) for one in trial.cases if one.outcome == "failed"],
        refusals=[Refusal(case=one.label, reason=one.reason) for one in _refused(trial)],
        error_ratio=trial.worst,
        note=trial.note,
        seconds=round(time.perf_counter() - start, 4),
    )


def _counts(trial: Trial) -> Cases:
    return Cases(
        passed=trial.count("passed"),
        refused=trial.count("refused"),
        failed=trial.count("failed"),
        left_out=len(trial.labels) - sum(one.number > 0 for one in trial.cases),
    )


def _failure(instance: Instance, one: Case) -> Failure:
    return Failure(id=case_id(instance.id, one.number), case=one.label, reason=one.reason)


def _refused(trial: Trial) -> list[Case]:
    return [one for one in trial.cases if one.outcome == "refused"]


def _verdict(instance: Instance, trial: Trial, xfails: Xfails) -> tuple[Status, str]:
    expected = xfails.reason(instance.check.id, instance.subject)
    if trial.count("failed"):
        reason = _summary(trial)
        return ("fail", reason) if expected is None else ("xfail", f"{expected} ({reason})")
    if not trial.count("passed"):
        return "refused", "; ".join(dict.fromkeys(one.reason for one in _refused(trial)))
    return ("pass", "") if expected is None else ("xpass", expected)


def _summary(trial: Trial) -> str:
    """Return the first failure, and how many there are."""
    failed = [one for one in trial.cases if one.outcome == "failed"]
    of = "" if len(trial.cases) == 1 else f"{len(failed)} of {len(trial.cases)} cases; "
    return f"{of}{failed[0]}"
