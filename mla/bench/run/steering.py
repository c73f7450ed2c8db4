"""What may cut a run short, what it resumes from, and how to resume it later."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from mla.bench import results
from mla.bench.plan import options as commands
from mla.bench.plan.request import Request, ScenarioPlan
from mla.bench.results.cases import ADDED, due
from mla.bench.results.file import printable
from mla.bench.results.schema import Case, Run
from mla.bench.run.keeper import Keeper
from mla.bench.run.watchdog import OVER_BUDGET, Budget
from mla.bench.terminal.lines import OTHERS
from mla.command import files, last_words, launcher
from mla.command.console import Note, note
from mla.command.exit_codes import Exit
from mla.errors import ResultError
from mla.failures import file

# Seconds without a forward after which a device is assumed to hang.
HANG_AFTER = 600.0
# Facts of an environment that may differ between two parts of a file: what a backend reports of itself, of
# which some is measured, what else was running, and which baselines were added.
_VARY = ("backend.", OTHERS, ADDED, "resumed")


@dataclass(frozen=True)
class Steering:
    """What may cut a run short, what it resumes from, and what is kept as it advances."""

    budget: Budget = field(default_factory=Budget)
    kept: Sequence[results.Case] = ()  # of the run that is resumed: these are not measured again
    ceilings: Sequence[results.Ceiling] = ()  # that the kept cases used
    hang_after: float = HANG_AFTER
    keeper: Keeper | None = None  # of the first failure
    target: Path | None = None  # where the result goes
    show: Callable[[results.Run], None] = lambda run: None  # what a reader gets of a run that hangs
    log: Note = lambda text: None  # one line per finished scenario

    def save(self, run: results.Run, *, last: bool = False) -> None:
        """Write what there is, so that it's kept whatever comes; to a pipe only the last time."""
        try:
            if self.target and (last or not files.is_stream(self.target)):
                results.write(run, self.target)
        except ResultError as error:
            note(f"{error} The run continues and will try again.")

    def hung(self, run: results.Run, sentence: str, code: Exit = Exit.BACKEND) -> None:
        """End the process: a call into a driver cannot be interrupted."""
        with contextlib.suppress(Exception):  # nothing may keep the process from ending
            self.save(run, last=True)
            self.show(run)
            note(f"error: {sentence}")
            last_words.dismiss(code)
        os._exit(code)


def steering(
    request: Request,
    empty: results.Run,
    budget: Budget,
    old: results.Run | None,
    show: Callable[[results.Run], None],
) -> Steering:
    """Return what steers a run; `empty` is its result without cases, `old` the one to resume.

    Raises `ResultError`.
    """
    options, keeper = request.options, None
    kept, ceilings = _kept(request, empty, old), old.ceilings if old is not None else ()
    if options.dump_failure is not None:
        file.prepare(options.dump_failure)
        name = options.backend or request.setting.backend.name
        keeper = Keeper(options.dump_failure, name, list(options.backend_options))
    return Steering(budget, kept, ceilings, options.hang_after, keeper, options.target, show)


def skipped(request: Request, run: results.Run) -> str | None:
    """Return how many cases the budget cut, and how to resume; None if it cut none."""
    rounds = {point.name: point.rounds for point in request.points}
    reasons = [case.check.reason for case in run.cases if case.check.reason.startswith(OVER_BUDGET)]
    short = sum(
        0 < case.passes < due(case, rounds[case.scenario]) and not case.interrupted for case in run.cases
    )
    if not reasons and not short:
        return None
    did = [f"skipped {len(reasons)}"] * bool(reasons) + [f"cut short {short}"] * bool(short)
    cut = f"--budget {' and '.join(did)} of {len(run.cases)} cases; "
    if reasons and not any(case.latency_ms for case in run.cases):
        less = "measure less with --runs, --passes, --scenario or --mode eager --cache warm"
        why = reasons[0].partition(": ")[2]
        cut = f"--budget was too short for any number ({why}): give it more, or {less}. {cut}"
    if not request.options.target:
        return f"{cut}with -o, a later run could --resume it"
    words = [*request.command, *request.selection, "--implementations", ",".join(request.implementations)]
    return f"{cut}resume with: {commands.command([*words, '--resume', str(request.options.target)])}"


# ------------------------------------------------------------------------------------------------- resuming


def _kept(request: Request, run: results.Run, old: results.Run | None) -> list[results.Case]:
    """Return the cases of an earlier run that need not be measured again: those that are wrong or complete.

    Raises `ResultError` if its file holds another run.
    """
    path, plans = request.options.resume, {plan.name: plan for plan in request.scenarios}
    if old is None:
        return []
    if old.plan is None or run.plan is None:
        raise ResultError(f"cannot resume '{path}': it does not say what was planned; start a new run.")
    kept = [case for case in old.cases if case.scenario in plans and _is_done(case, plans[case.scenario])]
    reasons = _changes(_facts(old, old.plan), _facts(printable(run), run.plan))
    if apart := sorted({*old.plan.scenarios} ^ {*run.plan.scenarios}):
        reasons.append(f"workload or axes differ, only one of them has scenario '{apart[0]}'")
    elif old.plan.digest != run.plan.digest:
        reasons.append("workload differs: a scenario has other lengths or counts, or their order changed")
    for case in kept:
        where = f" of case '{case.scenario}, {case.implementation}'"
        reasons += _changes(case.ops, plans[case.scenario].ops.get(case.implementation, case.ops), where)
    if reasons:
        raise ResultError(
            f"cannot resume '{path}', it holds another run: {'; '.join(reasons)}. Repeat its options, "
            "or write a new file."
        )
    none = f"no case of '{path}' is complete, so all are measured"
    note(f"resuming   {f'{len(kept)} cases of {str(path)!r} are kept' if kept else none}")
    if kept and OTHERS in old.environment:
        run.environment[OTHERS] = old.environment[OTHERS]
    return kept


def _is_done(case: Case, plan: ScenarioPlan) -> bool:
    """Return whether a case is wrong, or has all its passes: what was cut short is measured again."""
    whole = case.check.status == "ok" and case.passes >= due(case, plan.point.rounds)
    return not case.interrupted and (whole or case.check.status == "wrong")


def _changes(old: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> list[str]:
    """Return "NAME was A and is B" for every fact that is not the same."""
    both = ((name, old.get(name, "not given"), now.get(name, "not given")) for name in {**old, **now})
    return [f"{name}{where} was {first} and is {second}" for name, first, second in both if first != second]


def _facts(run: Run, plan: results.Plan) -> dict[str, str]:
    """Return what must be equal for two parts of a file to be one run: what ran, on what, with what."""
    facts = {
        **{f"backend {name}": value for name, value in msgspec.structs.asdict(run.backend).items()},
        **{f"config's {name}": value for name, value in run.config.items()},
        "implementations": ",".join(plan.implementations),
        **{name: getattr(run, name) for name in ("dtype", "attention", "page_size", "seed")},
    }
    for flag, value in zip(plan.options[::2], plan.options[1::2], strict=True):
        facts[flag] = f"{facts[flag]} {value}" if flag in facts else value
    for key, value in run.environment.items():
        if not launcher.is_fact(key) and not key.startswith(_VARY):
            facts[key] = value
    if threads := run.environment.get("torch_threads"):
        facts.setdefault("OMP_NUM_THREADS", threads)  # which torchrun sets, and srun does not
    return {name: str(value) for name, value in facts.items() if value is not None}
