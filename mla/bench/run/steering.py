"""What may cut a run short, what it resumes from, and how to resume it later."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mla.bench import results
from mla.bench.failures.keeper import Keeper
from mla.bench.plan import repro
from mla.bench.plan.options import RunOptions
from mla.bench.plan.request import Request
from mla.bench.results.passes import due
from mla.bench.run import resume
from mla.bench.run.budget import Budget
from mla.bench.workload.quantities import spoken
from mla.command import files, last_words
from mla.command.console import Note, note
from mla.command.exit_codes import Exit
from mla.errors import ResultError
from mla.failures import file

Show = Callable[[results.Run], None]
OVER_BUDGET = "skipped by --budget"
# Seconds without a forward after which a device is assumed to hang.
HANG_AFTER = 600.0


def _end_here(run: results.Run, sentence: str, code: Exit = Exit.BACKEND) -> None:
    last_words.dismiss()
    os._exit(code)


@dataclass(frozen=True)
class Steering:
    """What may cut a run short, what it resumes from, and what is called as it advances."""

    budget: Budget = field(default_factory=Budget)
    kept: Sequence[results.Case] = ()  # of the run that is resumed: these are not measured again
    ceilings: Sequence[results.Ceiling] = ()  # that the kept cases used
    save: Callable[[results.Run], None] = lambda run: None  # after every scenario
    log: Note = lambda text: None  # one line per finished scenario
    hang_after: float = HANG_AFTER
    hung: Callable[..., None] = _end_here  # as `_end_here`: must end the process
    keeper: Keeper | None = None  # of the first failure


def steering(
    options: RunOptions,
    request: Request,
    empty: results.Run,
    budget: Budget,
    old: results.Run | None,
    show: Show,
) -> Steering:
    """Return what steers a run; `empty` is its result without cases, `old` the one to resume.

    Raises `ResultError`.
    """
    kept = _kept(options, request, empty, old)

    def hung(run: results.Run, sentence: str, code: Exit = Exit.BACKEND) -> None:
        with contextlib.suppress(Exception):  # nothing may keep the process from ending
            _save(options, run, last=True)
            show(run)
            note(f"error: {sentence}")
            last_words.dismiss()
        os._exit(code)  # a call into a driver cannot be interrupted

    return Steering(
        budget,
        kept,
        old.ceilings if old is not None else (),
        save=lambda run: _save(options, run),
        hang_after=options.hang_after,
        hung=hung,
        keeper=_keeper(options, request),
    )


def _keeper(options: RunOptions, request: Request) -> Keeper | None:
    """Return what keeps the first failure, if that was asked for. Raises `ResultError`."""
    if options.dump_failure is None:
        return None
    file.prepare(options.dump_failure)
    name = options.backend or request.setting.backend.name
    return Keeper(options.dump_failure, name, list(options.backend_options))


def _kept(
    options: RunOptions, request: Request, run: results.Run, old: results.Run | None
) -> list[results.Case]:
    """Return the cases of an earlier run that need not be measured again."""
    if old is None or options.resume is None:
        return []
    kept = resume.kept_cases(options.resume, old, run, request.scenarios)
    note(f"resuming   {len(kept)} cases of '{options.resume}' are kept")
    if remark := resume.warning(old, run):
        note(f"warning: {remark}")
    if kept:
        resume.mark(old, run, remark)
    return kept


def _save(options: RunOptions, run: results.Run, *, last: bool = False) -> None:
    """Write what there is, so that it's kept whatever comes; to a pipe only the last time."""
    try:
        if options.target and (last or not files.is_stream(options.target)):
            results.write(run, options.target)
    except ResultError as error:
        note(f"{error} The run continues and will try again.")


def skipped(
    options: RunOptions, request: Request, run: results.Run, needed: float | None = None
) -> str | None:
    """Return how many cases the budget cut, what it should have been, and how to resume; None if it cut none.

    `needed` are the seconds that the whole run should be given.
    """
    rounds = {point.name: point.rounds for point in request.points}
    left_out = sum(case.check.reason.startswith(OVER_BUDGET) for case in run.cases)
    short = sum(
        0 < case.passes < due(case, rounds[case.scenario]) and not case.interrupted for case in run.cases
    )
    if not left_out and not short:
        return None
    words = [*request.command, *request.selection, "--implementations", ",".join(request.implementations)]
    command = repro.command([*words, "--resume", str(options.target)])
    on = f"resume with: {command}" if options.target else "with -o, a later run could --resume it"
    cut = f"--budget skipped {left_out} of {len(run.cases)} cases and cut short {short}"
    whole = "" if needed is None else f"the whole run fits into about {spoken(needed)}"
    if any(case.latency_ms for case in run.cases):
        return "; ".join(filter(None, (cut, whole, on)))
    why = next(case.check.reason for case in run.cases if case.check.reason.startswith(OVER_BUDGET))
    more = f"{whole}, so give it as much" if whole else "give it more"
    less = "measure less with --runs, --passes, --scenario or --mode eager --cache warm"
    less += " (the time counts from the start of the command)"
    return f"--budget was too short for any number ({why.partition(': ')[2]}): {more}, or {less}. {cut}; {on}"
