"""What is asked of a backend: every check of the device, each dtype, each op and a layer; and a run of it."""

from __future__ import annotations

import copy
import importlib.util
import math
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mla.command import environment
from mla.command.console import note
from mla.command.display import Progress
from mla.command.options import key_values, open_backend
from mla.conformance.card import blind
from mla.conformance.registry import DEVICE, DRAWN, DTYPE, LAYER, OP, ConformanceCheck, all_checks
from mla.conformance.report import (
    SCHEMA_VERSION,
    Cases,
    CheckedBackend,
    CheckResult,
    ConformanceReport,
    Failure,
    Status,
)
from mla.conformance.selection import (
    Xfails,
    chosen_cases,
    nothing_matches,
    require_cases,
    split,
)
from mla.conformance.trial import DTYPES, BackendUnderTest, Drawing, Trial, ask, kind_of
from mla.errors import UsageError
from mla.failures import file
from mla.failures.call import Watched, Watcher
from mla.reference import REFERENCE
from mla.text import dtype_name
from mla_backends.api import Backend, FusedOp
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


def claimed_dtypes(subject: BackendUnderTest) -> tuple[torch.dtype, ...]:
    """Return the dtypes of a layer that the backend claims; float32 if it claims none."""
    claimed = _claimed(subject)
    return tuple(dtype for dtype in DTYPES if dtype in claimed) or (torch.float32,)


def _claimed(subject: BackendUnderTest) -> list[torch.dtype]:
    said = ask(lambda: tuple(subject.backend.dtypes()), ())
    dtypes = (dtype for dtype in said if isinstance(dtype, torch.dtype) and dtype.is_floating_point)
    return list(dict.fromkeys(dtypes))


def trials(
    subject: BackendUnderTest, dtypes: Sequence[torch.dtype], only: Sequence[str] = ()
) -> tuple[Trial, ...]:
    """Return what runs on this backend, in order; `only` keeps what matches any of its patterns.

    The reference is checked where no op serves what most layers have, or where it is asked for.
    """
    offers: Mapping[str, FusedOp] = ask(lambda: dict(subject.backend.ops()), {})
    offered = {str(name): op for name, op in offers.items() if isinstance(op, FusedOp)}
    every = [trial for check in all_checks() for trial in _of_check(check, subject, dtypes, offered)]
    for trial in every:
        trial.chosen = chosen_cases(only, trial.check.id, trial.brackets)

    @cache
    def served(kind: str, dtype: torch.dtype) -> bool:
        fused = (trial for trial in every if trial.check.kind == kind and trial.of != "reference")
        return any(trial.dtype == dtype and trial.serves_most() for trial in fused)

    named = [pattern for pattern in only if "[reference" in pattern]

    def idle(trial: Trial) -> bool:
        check, drawn = trial.check, trial.check.fails == DRAWN
        if trial.of != "reference":
            return False
        if named and not drawn and chosen_cases(named, check.id, trial.brackets) != frozenset():
            return False
        among = [trial.dtype] if drawn else dtypes
        return check.scope == LAYER or any(served(check.kind, dtype) for dtype in among)

    needed = (trial for trial in every if trial.chosen != frozenset() and not idle(trial))
    return tuple(sorted(needed, key=lambda trial: trial.check.fails == DRAWN))  # which come last


def _of_check(
    check: ConformanceCheck,
    subject: BackendUnderTest,
    dtypes: Sequence[torch.dtype],
    offered: Mapping[str, FusedOp],
) -> Iterator[Trial]:
    if check.scope == DEVICE:
        yield Trial(subject, check, torch.float32)
    elif check.scope == DTYPE:  # those that no layer has, but the backend claims, as well
        more = (dtype for dtype in _claimed(subject) if dtype not in DTYPES)
        yield from (Trial(subject, check, dtype) for dtype in (*dtypes, *more))
    elif check.scope == OP:
        of_kind = {name: op for name, op in offered.items() if kind_of(op) == check.kind}
        for dtype in dtypes:
            yield from (Trial(subject, check, dtype, name, op) for name, op in of_kind.items())
            yield Trial(subject, check, dtype, "reference", REFERENCE[check.kind])
    else:  # without fused ops both policies are the same
        policies = ("auto", "reference") if offered else ("auto",)
        yield from (Trial(subject, check, dtype, policy) for dtype in dtypes for policy in policies)


def carry_out(trial: Trial, xfails: Xfails) -> CheckResult:
    """Run one check and classify its outcome."""
    start = time.perf_counter()
    trial.run()
    status, reason = _verdict(trial, xfails.reason(trial.check.id, trial.brackets))
    return CheckResult(
        id=trial.id,
        check=trial.check.id,
        kind=trial.check.fails,
        of=trial.of,
        dtype=trial.dtype_name,
        status=status,
        reason=reason,
        cases=Cases(
            passed=trial.passed,
            refused=len(trial.refusals),
            failed=len(trial.failures),
            left_out=trial.left_out,
        ),
        failures=trial.failures,
        refusals=trial.refusals,
        error_ratio=trial.worst,
        note=trial.note,
        seconds=round(time.perf_counter() - start, 4),
        drawn=trial.drawn,
        late=trial.late,
    )


def _verdict(trial: Trial, expected: str | None) -> tuple[Status, str]:
    """Return how a check ended, and why; `expected` is why it should fail."""
    if trial.failures:
        of = "" if trial.ran == 1 else f"{len(trial.failures)} of {trial.ran} cases; "
        reason = f"{of}{trial.failures[0]}"
        return ("fail", reason) if expected is None else ("xfail", f"{expected} ({reason})")
    if not trial.passed:
        return "refused", "; ".join(dict.fromkeys(refusal.reason for refusal in trial.refusals))
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
    ended: set[str] = field(default_factory=set)  # the ids of checks that ended
    start: float = field(default_factory=time.monotonic)  # of the run, later by what is beside its time
    kept: bool = False  # whether a wrong call was

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
    def planned(self) -> tuple[Trial, ...]:
        """What runs, in order. Raises `UsageError` where a pattern matches nothing."""
        only = self.options.only
        planned = trials(self.subject, self.dtypes, only)
        if not planned:
            raise nothing_matches(only, [trial.id for trial in trials(self.subject, self.dtypes)])
        require_cases(planned)
        return planned

    @property
    def left(self) -> float:
        """The seconds that are left of a run's; below 0 if it is late."""
        return self.start + self.options.seconds - time.monotonic()

    def share(self, trial: Trial) -> float:
        """Return the seconds for a check that draws: its share of those left."""
        if not (weight := self._weight(trial)):
            return 0.0
        others = (self._weight(peer) for peer in self.planned if peer.id not in {*self.ended, trial.id})
        return max(0.0, self.left) * weight / (weight + sum(others))

    def _weight(self, trial: Trial) -> float:
        """Return the weight of a check that draws, which is small if its op refuses what most layers have."""
        usual = DRAW_TIMES.get(trial.check.kind, 1.0) if trial.check.fails == DRAWN else 0.0
        return usual * (UNUSUAL if usual and not trial.serves_most() else 1.0)

    @property
    def until(self) -> float:
        """When a check that starts now and draws nothing is to end, by `time.monotonic`."""
        if self.options.draws is not None:
            return math.inf
        drawn = any(trial.check.fails == DRAWN for trial in self.planned)
        now, end = time.monotonic(), self.options.seconds * (1 - FOR_DRAWS[self.options.quick] * drawn)
        return now + (self.start + end - now) * (MAX_SHARE if len(self.planned) > 1 else 1)

    def carry_out(self, trial: Trial) -> CheckResult:
        """Run one check, and keep the first wrong call if that was asked for."""
        drawing, share = self.subject.drawing, self.share(trial)
        drawing.seconds, drawing.least = share, MIN_DRAWS
        drawing.most, drawing.until = min(STRETCH * share, max(0.0, self.left)), self.until
        result = carry_out(trial, self.xfails)
        self.ended.add(trial.id)
        if result.drawn is not None:
            self.start += result.seconds - result.drawn.seconds  # shrinking is beside the time of the run
        if self.options.dump_failure and not self.kept and result.status == "fail":
            self._keep(trial, result.failures[0], self.options.dump_failure)
        return result

    def run(self, words: Sequence[str]) -> ConformanceReport:
        """Run all checks, or those before Ctrl-C or a signal. `words`: those of the command line."""
        results: list[CheckResult] = []
        if self.options.dump_failure:
            file.prepare(self.options.dump_failure)
            self.subject.drawing.folder = self.options.dump_failure
        with Progress(len(self.planned)) as progress:
            try:
                for trial in self.planned:
                    progress.advance(trial.id, 0)
                    if self.options.verbose:  # in case it ends the process
                        note(trial.id)
                    results.append(self.carry_out(trial))
                    progress.advance(trial.id, 1)
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

    def _keep(self, trial: Trial, case: Failure, folder: Path) -> None:
        """Keep the call that a wrong case found, or say why there is none. Raises nothing."""
        subject, options = self.subject, self.options
        try:
            watcher = self._watched(trial, split(case.id)[1])
            if watcher.wrong is None:
                why = watcher.reason or "no call of an op in it was wrong when it ran again"
                note(f"--dump-failure kept nothing of {case.id}: {why}")
                return
            self.kept = True
            origin = file.Origin(
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
            file.write_call(folder, watcher.wrong, origin)
        except Exception as error:  # noqa: BLE001  # whatever a backend raises when it is called again
            note(f"--dump-failure kept nothing of {case.id}: {describe(error)}")
            return
        path, replay = folder / file.NAME, file.replay_command(folder)
        note(f"{case.id}: the first wrong call is kept in '{path}'; replay it with: {replay}")

    def _watched(self, trial: Trial, number: int | None) -> Watcher:
        """Run a case again, or the check as a whole; return what judged each call of its ops."""
        drawn = trial.check.fails == DRAWN  # and says what outputs hold before a call
        watcher = Watcher(self.subject.backend.synchronize, poisons=not drawn)
        again = replace(
            self.subject,
            backend=with_watched_ops(self.subject.backend, watcher),
            drawing=replace(self.subject.drawing, again=True),
        )
        op = trial.op and Watched(trial.check.kind, trial.of, trial.op, watcher)
        replace(trial, subject=again, op=op, chosen=None if number is None else frozenset({number})).run()
        return watcher


def with_watched_ops(backend: Backend, watcher: Watcher) -> Backend:
    """Return the backend with ops that are watched, called one by one."""
    watched: dict[str, FusedOp] = {
        name: Watched(kind_of(op), name, op, watcher) for name, op in backend.ops().items()
    }
    twin = copy.copy(backend)
    twin.ops = lambda: watched  # type: ignore[method-assign]  # of this twin alone
    twin.sequence = lambda calls, moving: None  # type: ignore[method-assign]
    return twin
