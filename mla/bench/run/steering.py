"""What the options say about a run's course: what it goes on from, what ends it early, how to go on then."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable

from mla.bench import results
from mla.bench.plan.options import RunOptions
from mla.bench.run import resume
from mla.bench.run import scenario_run as session
from mla.bench.run.budget import Budget
from mla.bench.run.scenario_run import Request
from mla.bench.run.scheduler import OVER_BUDGET, Steering
from mla.command.console import Note
from mla.command.exit_codes import Exit
from mla.errors import ResultError

Show = Callable[[results.Run], None]


def steering(
    options: RunOptions, request: Request, budget: Budget, old: results.Run | None, note: Note, show: Show
) -> Steering:
    """Return what steers a run; `old` is the run to resume. Raises `ResultError`."""
    kept: list[results.Case] = []
    if old is not None and options.resume is not None:
        now = session.describe_run(request)
        kept = resume.kept_cases(options.resume, old, now, request.scenarios)
        note(f"resuming   {len(kept)} cases of '{options.resume}' are kept")
        if warning := resume.warning(old, now):
            note(warning)

    def save(run: results.Run) -> None:
        try:
            if options.target:
                results.write(run, options.target)
        except ResultError as error:
            note(f"{error} The run goes on, and tries again.")

    def hung(run: results.Run, sentence: str) -> None:
        with contextlib.suppress(Exception):  # nothing may keep the process from ending
            save(run)
            show(run)
            note(f"error: {sentence}")
        os._exit(Exit.BACKEND)  # a call into a driver cannot be interrupted

    ceilings = old.ceilings if old is not None else ()
    return Steering(budget, kept, ceilings, save, hang_after=options.hang_after, hung=hung)


def left_out(options: RunOptions, request: Request, run: results.Run) -> str | None:
    """Return how many cases the budget cut, and how to go on; None if it cut none."""
    turns = {scenario.name: scenario.rounds for scenario in request.scenarios}
    left_out = sum(case.check.reason == OVER_BUDGET for case in run.cases)
    short = sum(0 < case.passes < turns[case.scenario] and not case.interrupted for case in run.cases)
    if not left_out and not short:
        return None
    words = [*request.command, *options.selection(), "--implementations", ",".join(request.implementations)]
    command = shlex.join(["python", "-m", "mla.bench", *words, "--resume", str(options.target)])
    on = f"go on with: {command}" if options.target else "with -o, a later run could go on with --resume"
    return f"--budget left out {left_out} of {len(run.cases)} cases and cut short {short}; {on}"
