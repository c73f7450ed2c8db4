"""What is asked of a backend: every check of the device, of each dtype, of each op and of a layer."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING

import torch

from mla.cases import KINDS
from mla.command.console import note
from mla.command.options import BackendOptions, open_backend
from mla.conformance.drawn import usual_spec
from mla.conformance.registry import DEVICE, DRAWN, DTYPE, LAYER, OP, ConformanceCheck, all_checks
from mla.conformance.report import Cases, CheckResult, Failure, Refusal, Status
from mla.conformance.selection import Numbers, Xfails, case_id, chosen_cases, nothing_matches, require_cases
from mla.conformance.trial import DTYPES, BackendUnderTest, Drawing, Trial, ask
from mla.errors import UsageError
from mla.layer.ops import preflight_reasons
from mla.reference import REFERENCE
from mla.text import dtype_name
from mla_backends.api import Backend, FusedOp, current
from mla_backends.registry import create

if TYPE_CHECKING:
    from mla.conformance.failures import Keeper

MINUTES = {True: 1.0, False: 5.0}  # that a run takes, if it is quick and if not
ENDING = 1.5  # seconds of it that are left for the card, and for the process to end
MIN_DRAWS = 300  # judged draws of an op in a dtype, with which its check is green
STRETCH = 2.0  # times its share of the time that a check may draw for until it has as many
FOR_DRAWS = {True: 0.55, False: 0.7}  # of the time at least, if it is quick and if not
MAX_SHARE = 0.15  # of the time that is left for fixed checks, for one of them
# The time of a draw, in that of the quickest op: so much more of the run's time are draws of the kind given.
DRAW_TIMES = {
    "latent_attention": 3.5, "sparse_latent_attention": 3.0, "select_latents": 3.0, "expanded_attention": 2.5,
    "batched_linear": 2.0, "write_latent": 2.0, "write_index_key": 1.5, "linear": 1.3, "rotate_query": 1.3,
}  # fmt: skip
UNUSUAL = 0.2  # times the time of an op that serves what most layers have


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

    def run(self, subject: BackendUnderTest) -> Trial:
        """Run the check. Raises nothing but KeyboardInterrupt."""
        of_ops = self.check.scope in (OP, LAYER)
        trial = Trial(subject, self.dtype or torch.float32, self.op, self.of, self.check.kind)
        trial.policy = self.of if self.check.scope == LAYER else "auto"
        trial.may_refuse, trial.chosen = of_ops, self.chosen
        trial.until = subject.drawing.until
        trial.run(self.check.run)
        return trial

    def labels(self, subject: BackendUnderTest) -> tuple[str, ...]:
        """Return the labels of all its cases, of which none runs; empty for a check without cases."""
        return tuple(replace(self, chosen=frozenset()).run(subject).labels)


def claimed_dtypes(subject: BackendUnderTest) -> tuple[torch.dtype, ...]:
    """Return the dtypes of a layer that the backend claims; float32 if it claims none."""
    claimed = _claimed(subject)
    return tuple(dtype for dtype in DTYPES if dtype in claimed) or (torch.float32,)


def _claimed(subject: BackendUnderTest) -> list[torch.dtype]:
    said = ask(lambda: tuple(subject.backend.dtypes()), ())
    dtypes = (dtype for dtype in said if isinstance(dtype, torch.dtype) and dtype.is_floating_point)
    return list(dict.fromkeys(dtypes))


def instances(
    subject: BackendUnderTest, dtypes: Sequence[torch.dtype], only: Sequence[str] = ()
) -> tuple[Instance, ...]:
    """Return what runs on this backend, in order; `only` keeps what matches any of its patterns.

    The reference is checked where no op serves what most layers have, or where it is asked for.
    """
    offers: Mapping[str, FusedOp] = ask(lambda: dict(subject.backend.ops()), {})
    offered = {str(name): op for name, op in offers.items() if isinstance(op, FusedOp)}
    every = (instance for check in all_checks() for instance in _of_check(check, subject, dtypes, offered))
    kept = ((instance, chosen_cases(only, instance.check.id, instance.subject)) for instance in every)
    chosen = (replace(instance, chosen=numbers) for instance, numbers in kept if numbers != frozenset())

    @cache
    def served(kind: str, dtype: torch.dtype | None) -> bool:
        of_kind = ((name, op) for name, op in offered.items() if _kind(op) == kind)
        return dtype is not None and any(_serves(subject, kind, dtype, *named) for named in of_kind)

    named = [pattern for pattern in only if "[reference" in pattern]

    def idle(instance: Instance) -> bool:
        check, drawn = instance.check, instance.check.fails == DRAWN
        if instance.of != "reference" or check.scope not in (OP, LAYER):
            return False
        if named and not drawn and chosen_cases(named, check.id, instance.subject) != frozenset():
            return False
        return check.scope == LAYER or any(
            served(check.kind, dtype) for dtype in ([instance.dtype] if drawn else dtypes)
        )

    needed = (instance for instance in chosen if not idle(instance))
    return tuple(sorted(needed, key=lambda instance: instance.check.fails == DRAWN))  # which come last


def _of_check(
    check: ConformanceCheck,
    subject: BackendUnderTest,
    dtypes: Sequence[torch.dtype],
    offered: Mapping[str, FusedOp],
) -> Iterator[Instance]:
    if check.scope == DEVICE:
        yield Instance(check)
    elif check.scope == DTYPE:  # those that no layer has, but the backend claims, as well
        more = (dtype for dtype in _claimed(subject) if dtype not in DTYPES)
        yield from (Instance(check, dtype=dtype) for dtype in (*dtypes, *more))
    elif check.scope == OP:
        for dtype in dtypes:
            of_kind = {name: op for name, op in offered.items() if _kind(op) == check.kind}
            yield from (Instance(check, name, dtype, op) for name, op in of_kind.items())
            yield Instance(check, "reference", dtype, REFERENCE[check.kind])
    else:  # without fused ops both policies are the same
        policies = ("auto", "reference") if offered else ("auto",)
        yield from (Instance(check, policy, dtype) for dtype in dtypes for policy in policies)


def _serves(subject: BackendUnderTest, kind: str, dtype: torch.dtype, name: str, op: FusedOp) -> bool:
    """Return whether an op serves what most layers have."""

    def reasons() -> list[str]:
        spec = usual_spec(kind, dtype, ask(lambda: subject.device, None))
        said = list(op.unsupported_reasons(spec)) or preflight_reasons(name, op, spec, subject.say)
        if said or not KINDS[kind].prepares:
            return said
        return list(op.unsupported_batch(spec, (1,), (64,), 64 if KINDS[kind].cached else None))

    return current(op.contract, kind) and not ask(reasons, ["it raises"])


def carry_out(instance: Instance, subject: BackendUnderTest, xfails: Xfails) -> CheckResult:
    """Run one check and classify its outcome."""
    start = time.perf_counter()
    trial = instance.run(subject)
    status, reason = _verdict(trial, xfails.reason(instance.check.id, instance.subject))
    failed, refused = trial.ended("failed"), trial.ended("refused")
    return CheckResult(
        id=instance.id,
        check=instance.check.id,
        kind=instance.check.fails,
        of=instance.of,
        dtype=dtype_name(instance.dtype) if instance.dtype else "",
        status=status,
        reason=reason,
        cases=Cases(
            passed=len(trial.ended("passed")),
            refused=len(refused),
            failed=len(failed),
            left_out=len(trial.labels) - sum(case.number > 0 for case in trial.cases),
        ),
        failures=[Failure(case_id(instance.id, case.number), case.label, case.reason) for case in failed],
        refusals=[Refusal(case.label, case.reason) for case in refused],
        error_ratio=trial.worst,
        note=trial.note,
        seconds=round(time.perf_counter() - start, 4),
        drawn=trial.drawn,
        late=trial.late,
    )


def _verdict(trial: Trial, expected: str | None) -> tuple[Status, str]:
    """Return how a check ended, and why; `expected` is why it should fail."""
    if failed := trial.ended("failed"):
        of = "" if len(trial.cases) == 1 else f"{len(failed)} of {len(trial.cases)} cases; "
        reason = f"{of}{failed[0]}"
        return ("fail", reason) if expected is None else ("xfail", f"{expected} ({reason})")
    if not trial.ended("passed"):
        return "refused", "; ".join(dict.fromkeys(case.reason for case in trial.cases))
    if trial.drawn is not None and trial.drawn.judged < MIN_DRAWS:
        return "incomplete", f"{trial.drawn.judged} of {MIN_DRAWS} drawn cases were judged"
    return ("pass", "") if expected is None else ("xpass", expected)


def _kind(op: FusedOp) -> str:
    return str(getattr(op, "contract", "")).partition("/")[0]


def require_hypothesis() -> None:
    """Raise `UsageError` where cases cannot be drawn."""
    if importlib.util.find_spec("hypothesis") is None:
        raise UsageError(
            "the suite needs hypothesis to draw cases, and it is not installed: `pip install hypothesis` "
            "(it comes with `mla-bench[conformance]`)."
        )


@dataclass(frozen=True)
class Asked:
    """What the command line, or the options of pytest, ask for."""

    backend: BackendOptions
    dtypes: Sequence[str] = ()  # names; empty: those the backend claims
    only: Sequence[str] = ()  # patterns; empty: every check
    quick: bool = False
    minutes: float | None = None  # that a run takes; None: as `MINUTES` says
    draws: int | None = None  # of every op in every dtype, in place of a time
    seed: int = 0

    @property
    def seconds(self) -> float:
        """How long checks may take."""
        return 60 * (MINUTES[self.quick] if self.minutes is None else self.minutes) - ENDING

    def alone(self) -> list[str]:
        """Return the command that runs one case, without its `--only`."""
        words = ["python", "-m", "mla.conformance", "--backend", str(self.backend.backend)]
        words += [word for option in self.backend.backend_options for word in ("-O", option)]
        for flag, value in (("--device", self.backend.device), ("--threads", self.backend.threads)):
            words += [] if value is None else [flag, str(value)]
        words += ["--seed", str(self.seed)] * bool(self.seed)
        words += [] if self.minutes is None else ["--minutes", f"{self.minutes:g}"]
        words += [] if self.draws is None else ["--draws", str(self.draws)]
        return [*words, *(["--quick"] * self.quick)]


@dataclass
class Suite:
    """A backend that is open, and what is checked of it."""

    asked: Asked
    subject: BackendUnderTest
    dtypes: tuple[torch.dtype, ...]
    xfails: Xfails = field(default_factory=Xfails)
    keeper: Keeper | None = None
    selected: Sequence[Instance] | None = None  # what of the plan a pytest runs; None: all
    ended: set[str] = field(default_factory=set)  # the ids of checks that ended
    start: float = field(default_factory=time.monotonic)  # of the run, later by what is beside its time

    @classmethod
    def opened(cls, asked: Asked, xfails: Xfails) -> Suite:
        """Open the backend. Raises `UsageError`, `BackendError`."""
        opened, settings = open_backend(asked.backend), asked.backend.key_values()

        def reopen(more: Mapping[str, str]) -> Backend:
            return create(opened.name, {**settings, **more})

        subject = BackendUnderTest(opened.backend, opened.name, asked.quick, opened.version, reopen, note)
        claimed = claimed_dtypes(subject)
        names = [dtype_name(dtype) for dtype in claimed]
        for name in asked.dtypes:
            if name not in names:
                raise UsageError(f"the backend does not claim {name}; it claims: {', '.join(names)}.")
        chosen = tuple(dtype for dtype in claimed if not asked.dtypes or dtype_name(dtype) in asked.dtypes)
        drawing = Drawing(asked.draws, seed=asked.seed)
        return cls(asked, replace(subject, drawing=drawing), chosen, xfails)

    @cached_property
    def planned(self) -> tuple[Instance, ...]:
        """What runs, in order. Raises `UsageError` where a check or a case is not there."""
        only = self.asked.only
        planned = instances(self.subject, self.dtypes, only)
        if not planned:
            raise nothing_matches(only, [peer.id for peer in instances(self.subject, self.dtypes)])
        require_cases(planned, self.subject)
        return planned

    @property
    def left(self) -> float:
        """The seconds that are left of a run's; below 0 if it is late."""
        return self.start + self.asked.seconds - time.monotonic()

    def share(self, instance: Instance) -> float:
        """Return the seconds for a check that draws: its share of those left."""
        if instance.check.fails != DRAWN:
            return 0.0
        among = self.planned if self.selected is None else self.selected
        drawn = (peer for peer in among if peer.check.fails == DRAWN)
        weights = {peer.id: self._weight(peer) for peer in drawn if peer.id not in self.ended}
        return max(0.0, self.left) * self._weight(instance) / (sum(weights.values()) or 1.0)

    def _weight(self, instance: Instance) -> float:
        """Return the weight of a check that draws, which is small if its op refuses what most layers have."""
        check, op, dtype = instance.check, instance.op, instance.dtype
        if check.fails != DRAWN or op is None or dtype is None:
            return 0.0
        spec = usual_spec(check.kind, dtype, self.subject.device)
        usual = DRAW_TIMES.get(check.kind, 1.0)
        return usual * (UNUSUAL if ask(partial(op.unsupported_reasons, spec), []) else 1.0)

    @property
    def until(self) -> float:
        """When a check that starts now and draws nothing is to end, by `time.monotonic`."""
        if self.asked.draws is not None:
            return math.inf
        among = self.planned if self.selected is None else self.selected
        drawn = any(instance.check.fails == DRAWN for instance in among)
        now, end = time.monotonic(), self.asked.seconds * (1 - FOR_DRAWS[self.asked.quick] * drawn)
        return now + (self.start + end - now) * (MAX_SHARE if len(among) > 1 else 1)

    def carry_out(self, instance: Instance) -> CheckResult:
        """Run one check, and keep the first wrong call if that was asked for."""
        drawing, share = self.subject.drawing, self.share(instance)
        drawing.seconds, drawing.least = share, MIN_DRAWS
        drawing.most, drawing.until = min(STRETCH * share, max(0.0, self.left)), self.until
        result = carry_out(instance, self.subject, self.xfails)
        self.ended.add(instance.id)
        if result.drawn is not None:
            self.start += result.seconds - result.drawn.seconds  # shrinking is beside the time of the run
        if self.keeper is not None:
            self.keeper.see(instance, result)
        return result
