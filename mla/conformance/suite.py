"""What is asked of a backend: every check of the device, each dtype, each op and a layer; and a run of it."""

from __future__ import annotations

import copy
import importlib.util
import math
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mla.cases import KINDS
from mla.command import environment
from mla.command.console import note
from mla.command.display import Progress
from mla.command.options import key_values, open_backend
from mla.conformance.card import blind
from mla.conformance.drawn import usual_spec
from mla.conformance.registry import DEVICE, DRAWN, DTYPE, LAYER, OP, ConformanceCheck, all_checks
from mla.conformance.report import (
    SCHEMA_VERSION,
    Cases,
    CheckedBackend,
    CheckResult,
    ConformanceReport,
    Failure,
    Refusal,
    Status,
)
from mla.conformance.selection import (
    Numbers,
    Xfails,
    case_id,
    chosen_cases,
    nothing_matches,
    require_cases,
    split,
)
from mla.conformance.trial import DTYPES, BackendUnderTest, Drawing, Trial, ask, kind_of
from mla.errors import UsageError
from mla.failures import file
from mla.failures.call import Watched, Watcher
from mla.layer.ops import preflight_reasons
from mla.reference import REFERENCE
from mla.text import dtype_name
from mla_backends.api import Backend, FusedOp, current
from mla_backends.errors import describe
from mla_backends.registry import create

if TYPE_CHECKING:
    from mla.conformance.cli import Options

MIN_DRAWS = 300  # judged draws of an op in a dtype, with which its check is green
STRETCH = 2.0  # times its share of the time that a check may draw for until it has as many
FOR_DRAWS = {True: 0.55, False: 0.7}  # of the time at least, if it is quick and if not
MAX_SHARE = 0.15  # of the time that is left for fixed checks, for one of them
# The time of a draw, in that of the quickest op: so much more of the run's time are draws of the kind given.
DRAW_TIMES = {
    "latent_attention": 3.5, "sparse_latent_attention": 3.0, "select_latents": 3.0, "expanded_attention": 2.5,
    "batched_linear": 2.0, "write_latent": 2.0, "write_index_key": 1.5, "linear": 1.3, "rotate_query": 1.3,
}  # fmt: skip
SLOWEST = 10  # checks that --verbose names at the end
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
    def served(kind: str, dtype: torch.dtype) -> bool:
        of_kind = ((name, op) for name, op in offered.items() if kind_of(op) == kind)
        return any(_serves(subject, kind, dtype, *named) for named in of_kind)

    named = [pattern for pattern in only if "[reference" in pattern]

    def idle(instance: Instance) -> bool:
        check, drawn = instance.check, instance.check.fails == DRAWN
        if instance.of != "reference":
            return False
        if named and not drawn and chosen_cases(named, check.id, instance.subject) != frozenset():
            return False
        among = [instance.dtype or torch.float32] if drawn else dtypes
        return check.scope == LAYER or any(served(check.kind, dtype) for dtype in among)

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
            of_kind = {name: op for name, op in offered.items() if kind_of(op) == check.kind}
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


def require_hypothesis() -> None:
    """Raise `UsageError` where cases cannot be drawn."""
    if importlib.util.find_spec("hypothesis") is None:
        raise UsageError(
            "the suite needs hypothesis to draw cases, and it is not installed: `pip install hypothesis` "
            "(it comes with `mla-bench[conformance]`)."
        )


@dataclass
class Suite:
    """A backend that is open, and what is checked of it."""

    options: Options
    subject: BackendUnderTest
    dtypes: tuple[torch.dtype, ...]
    xfails: Xfails = field(default_factory=Xfails)
    keeper: Keeper | None = None
    ended: set[str] = field(default_factory=set)  # the ids of checks that ended
    start: float = field(default_factory=time.monotonic)  # of the run, later by what is beside its time

    @classmethod
    def opened(cls, options: Options, xfails: Xfails, start: float) -> Suite:
        """Open the backend. `start`: when the run began. Raises `UsageError`, `BackendError`."""
        opened, settings = open_backend(options), key_values(options.backend_options)

        def reopen(more: Mapping[str, str]) -> Backend:
            return create(opened.name, {**settings, **more})

        drawing = Drawing(options.draws, seed=options.seed)
        subject = BackendUnderTest(opened.backend, opened.name, opened.version, reopen, note, drawing)
        claimed = claimed_dtypes(subject)
        names = [dtype_name(dtype) for dtype in claimed]
        for name in options.dtypes:
            if name not in names:
                raise UsageError(f"the backend does not claim {name}; it claims: {', '.join(names)}.")
        chosen = tuple(
            dtype for dtype in claimed if not options.dtypes or dtype_name(dtype) in options.dtypes
        )
        return cls(options, subject, chosen, xfails, start=start)

    @cached_property
    def planned(self) -> tuple[Instance, ...]:
        """What runs, in order. Raises `UsageError` where a pattern matches nothing."""
        only = self.options.only
        planned = instances(self.subject, self.dtypes, only)
        if not planned:
            raise nothing_matches(only, [peer.id for peer in instances(self.subject, self.dtypes)])
        require_cases(planned, self.subject)
        return planned

    @property
    def left(self) -> float:
        """The seconds that are left of a run's; below 0 if it is late."""
        return self.start + self.options.seconds - time.monotonic()

    def share(self, instance: Instance) -> float:
        """Return the seconds for a check that draws: its share of those left."""
        if not (weight := self._weight(instance)):
            return 0.0
        others = (self._weight(peer) for peer in self.planned if peer.id not in {*self.ended, instance.id})
        return max(0.0, self.left) * weight / (weight + sum(others))

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
        if self.options.draws is not None:
            return math.inf
        drawn = any(instance.check.fails == DRAWN for instance in self.planned)
        now, end = time.monotonic(), self.options.seconds * (1 - FOR_DRAWS[self.options.quick] * drawn)
        return now + (self.start + end - now) * (MAX_SHARE if len(self.planned) > 1 else 1)

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

    def run(self, words: Sequence[str]) -> ConformanceReport:
        """Run all checks, or those before Ctrl-C or a signal. `words`: those of the command line."""
        results: list[CheckResult] = []
        with Progress(len(self.planned)) as progress:
            try:
                for instance in self.planned:
                    progress.advance(instance.id, 0)
                    if self.options.verbose:  # in case it ends the process
                        note(instance.id)
                    results.append(self.carry_out(instance))
                    progress.advance(instance.id, 1)
            except KeyboardInterrupt:
                pass
        if self.options.verbose:
            longest = sorted(results, key=lambda result: -result.seconds)[:SLOWEST]
            note(f"slowest: {', '.join(f'{result.id} {result.seconds:.1f} s' for result in longest)}")
        return self._report(words, results)

    def _report(self, words: Sequence[str], results: list[CheckResult]) -> ConformanceReport:
        subject, options, dtypes = self.subject, self.options, list(map(dtype_name, self.dtypes))
        planned, claimed = len(self.planned), list(map(dtype_name, claimed_dtypes(subject)))
        return ConformanceReport(
            schema_version=SCHEMA_VERSION,
            argv=["python", "-m", "mla.conformance", *words],
            alone=options.alone,
            created=environment.now(),
            git_commit=environment.git_commit(),
            interrupted=len(results) < planned,
            quick=options.quick,
            backend=CheckedBackend(
                name=subject.name,
                version=subject.version,
                device=str(subject.backend.device),
                device_name=ask(lambda: str(subject.backend.device_info().name), "unknown"),
            ),
            environment=ask(lambda: environment.environment(subject.backend), {"environment": "unknown"}),
            dtypes=dtypes,
            planned=planned,
            checks=results,
            unused_xfails=self.xfails.unused(),
            blind=list(blind(results, planned, options.quick, options.only, claimed, dtypes)),
        )


# ------------------------------------------------------------------------------------------ kept failures


@dataclass
class Keeper:
    """Writes the first failure of a suite into a folder."""

    folder: Path
    suite: Suite
    kept: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        """Make the folder before a long run. Raises `ResultError`."""
        file.prepare(self.folder)
        self.suite.subject.drawing.folder = self.folder

    def see(self, instance: Instance, result: CheckResult) -> None:
        """Keep the call that a check's first wrong case found, unless one was kept before. Raises nothing."""
        if self.kept or result.status != "fail":
            return
        case = result.failures[0]
        try:
            self._see(instance, case)
        except Exception as error:  # noqa: BLE001  # whatever a backend raises when it is called again
            note(f"--dump-failure kept nothing of {case.id}: {describe(error)}")

    def _see(self, instance: Instance, case: Failure) -> None:
        drawn = instance.check.fails == DRAWN  # and says what outputs hold before a call
        subject = self.suite.subject
        watcher = Watcher(subject.backend.synchronize, poisons=not drawn)
        op = instance.op and Watched(instance.check.kind, instance.of, instance.op, watcher)
        backend = with_watched_ops(subject.backend, watcher)
        number = split(case.id)[1]
        chosen = None if number is None else frozenset({number})
        again = replace(instance, op=op, chosen=chosen)
        drawing = replace(subject.drawing, again=True)
        again.run(replace(subject, backend=backend, drawing=drawing))
        if watcher.wrong is None:
            why = watcher.reason or "no call of an op in it was wrong when it ran again"
            note(f"--dump-failure kept nothing of {case.id}: {why}")
            return
        self.kept = True
        file.write_call(self.folder, watcher.wrong, self._origin(case))
        note(
            f"{case.id}: the first wrong call is kept in '{self.folder / file.NAME}'; replay it with: "
            f"{file.replay_command(self.folder)}"
        )

    def _origin(self, case: Failure) -> file.Origin:
        subject, options = self.suite.subject, self.suite.options
        return file.Origin(
            backend=subject.name,
            options=list(options.backend_options),
            device=str(subject.backend.device),
            command=shlex.join([*options.alone, "--only", case.id]),
            where=case.id,
            reason=case.reason,
            created=environment.now(),
            git_commit=environment.git_commit(),
            environment=environment.environment(subject.backend),
        )


def with_watched_ops(backend: Backend, watcher: Watcher) -> Backend:
    """Return the backend with ops that are watched, called one by one."""
    watched: dict[str, FusedOp] = {
        name: Watched(kind_of(op), name, op, watcher) for name, op in backend.ops().items()
    }
    twin = copy.copy(backend)
    twin.ops = lambda: watched  # type: ignore[method-assign]  # of this twin alone
    twin.sequence = lambda calls, moving: None  # type: ignore[method-assign]
    return twin
