"""What may cut a run short, what it resumes from, and how to resume it later."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mla.bench import results
from mla.bench.failures.keeper import Keeper
from mla.bench.plan import options as commands
from mla.bench.plan.options import RunOptions
from mla.bench.plan.request import Request, ScenarioPlan
from mla.bench.results.passes import due, planned_steps
from mla.bench.results.printable import printable
from mla.bench.results.schema import Case, Run
from mla.bench.run.watchdog import OVER_BUDGET, Budget
from mla.command import files, last_words, launcher
from mla.command.console import Note, note
from mla.command.exit_codes import Exit
from mla.errors import ResultError
from mla.failures import file
from mla.text import dtype_name

Show = Callable[[results.Run], None]
# Seconds without a forward after which a device is assumed to hang.
HANG_AFTER = 600.0
# Facts that a backend reports of itself; some are measured, such as a clock, so that they never repeat.
REPORTED = "backend."
# Where a completed file keeps what was different when its older cases were measured.
MARK = "resumed"


def _end_here(run: results.Run, sentence: str, code: Exit = Exit.BACKEND) -> None:
    last_words.dismiss(code)
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
            last_words.dismiss(code)
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


def _save(options: RunOptions, run: results.Run, *, last: bool = False) -> None:
    """Write what there is, so that it's kept whatever comes; to a pipe only the last time."""
    try:
        if options.target and (last or not files.is_stream(options.target)):
            results.write(run, options.target)
    except ResultError as error:
        note(f"{error} The run continues and will try again.")


def skipped(options: RunOptions, request: Request, run: results.Run) -> str | None:
    """Return how many cases the budget cut, and how to resume; None if it cut none."""
    rounds = {point.name: point.rounds for point in request.points}
    reasons = [case.check.reason for case in run.cases if case.check.reason.startswith(OVER_BUDGET)]
    short = sum(
        0 < case.passes < due(case, rounds[case.scenario]) and not case.interrupted for case in run.cases
    )
    if not reasons and not short:
        return None
    words = [*request.command, *request.selection, "--implementations", ",".join(request.implementations)]
    command = commands.command([*words, "--resume", str(options.target)])
    on = f"resume with: {command}" if options.target else "with -o, a later run could --resume it"
    cut = f"--budget skipped {len(reasons)} of {len(run.cases)} cases and cut short {short}"
    if not reasons or any(case.latency_ms for case in run.cases):
        return f"{cut}; {on}"
    less = "measure less with --runs, --passes, --scenario or --mode eager --cache warm"
    why = reasons[0].partition(": ")[2]
    return f"--budget was too short for any number ({why}): give it more, or {less}. {cut}; {on}"


# ------------------------------------------------------------------------------------------------- resuming


def _kept(
    options: RunOptions, request: Request, run: results.Run, old: results.Run | None
) -> list[results.Case]:
    """Return the cases of an earlier run that need not be measured again."""
    if old is None or options.resume is None:
        return []
    kept = kept_cases(options.resume, old, run, request.scenarios)
    if not kept:
        note(f"resuming   no case of '{options.resume}' is complete, so all are measured")
        return []
    note(f"resuming   {len(kept)} cases of '{options.resume}' are kept")
    if remark := _warning(old, run):
        note(f"warning: {remark}")
    _mark(old, run, remark)
    return kept


def kept_cases(path: Path, old: Run, now: Run, scenarios: Sequence[ScenarioPlan]) -> list[Case]:
    """Return the complete cases of a file. Raises `ResultError` if it holds another run than `now`."""
    if old.plan is None:
        raise ResultError(f"cannot resume '{path}': it does not say what was planned; start a new run.")
    plans = {scenario.name: scenario for scenario in scenarios}
    reasons = list(_differences(old, printable(now)))
    kept = []
    for case in () if reasons else old.cases:
        plan = plans.get(case.scenario)
        if plan is None or case.implementation not in old.plan.implementations:
            reasons.append(f"only it has a case '{case.scenario}, {case.implementation}'")
        elif _complete(case, plan.point.rounds):
            reasons += _case_differences(case, plan)
            kept.append(case)
    if reasons:
        raise ResultError(
            f"cannot resume '{path}', it holds another run: {'; '.join(reasons)}. Repeat its options, "
            "or write a new file."
        )
    return kept


def _warning(old: Run, now: Run) -> str | None:
    """Return what may make the new cases differ from the kept ones, though it forbids nothing."""
    facts = {"commit": (old.git_commit, now.git_commit)}
    for key in sorted({*old.environment, *now.environment}):
        if key.startswith(REPORTED):
            facts[key] = (old.environment.get(key), now.environment.get(key))
    changed = [
        f"{name} was {before} and is {after}" for name, (before, after) in facts.items() if before != after
    ]
    return f"kept cases were measured under other conditions: {'; '.join(changed)}" if changed else None


def _mark(old: Run, now: Run, remark: str | None) -> None:
    """Keep a warning, and those of earlier times, in the file that is completed."""
    remarks = [old.environment.get(MARK, ""), remark or ""]
    if any(remarks):
        now.environment[MARK] = "; ".join(filter(None, dict.fromkeys(remarks)))


def _complete(case: Case, rounds: int) -> bool:
    """Return whether a case is complete; what a budget cut short is measured again."""
    measured = case.check.status == "ok" and case.passes >= due(case, rounds)
    return not case.interrupted and (measured or case.check.status == "wrong")


def _differences(old: Run, now: Run) -> Iterator[str]:
    """Yield why a file cannot be completed by this run."""
    assert old.plan is not None
    assert now.plan is not None
    before, after = _flags(old.plan.options), _flags(now.plan.options)
    for flag in {**before, **after}:
        if before.get(flag) != after.get(flag):
            yield f"{flag} was {before.get(flag, 'not given')} and is {after.get(flag, 'not given')}"
    before, after = _facts(old), _facts(now)
    for name in {**before, **after}:
        first, second = before.get(name, "not recorded"), after.get(name, "not recorded")
        if first != second:
            yield f"{name} was {first} and is {second}"
    changed = [key for key in {**old.config, **now.config} if old.config.get(key) != now.config.get(key)]
    if changed:
        yield f"config differs in {', '.join(changed)}"
    yield from _scenario_differences(
        old.plan.scenarios, now.plan.scenarios, old.plan.digest != now.plan.digest
    )


def _facts(run: Run) -> dict[str, str]:
    """Return what must be equal for two parts of a file to be one run: what ran, on what, with what."""
    assert run.plan is not None
    facts = {
        "backend": run.backend.name,
        "the backend's version": run.backend.version,
        "the build of mla and the backend": run.backend.build,
        "device": run.backend.device,
        "the device's memory": run.backend.memory_bytes,
        "the device's cache": run.backend.cache_bytes,
        "implementations": ",".join(run.plan.implementations),
        "dtype": run.dtype,
        "attention": run.attention,
        "page size": run.page_size,
        "seed": run.seed,
    }
    for key, value in run.environment.items():
        if not launcher.is_fact(key) and not key.startswith(REPORTED) and key != MARK:
            facts[key] = value
    if threads := run.environment.get("torch_threads"):
        facts.setdefault("OMP_NUM_THREADS", threads)  # which torchrun sets, and srun does not
    return {name: str(value) for name, value in facts.items() if value is not None}


def _case_differences(case: Case, plan: ScenarioPlan) -> list[str]:
    """Return what a kept case was not measured as."""
    point, setting = plan.point, plan.setting
    expected = {
        "base": point.base,
        "point": dict(point.point),
        "mode": point.mode,
        "query_lens": list(point.query_lens),
        "history": list(point.history),
        "steps_per_pass": point.steps,
        "dtype": dtype_name(setting.dtype),
        "heads": setting.config.num_attention_heads,
        "layers": point.layers,
    }
    was = {name: getattr(case, name) for name in expected} | {"steps_per_pass": planned_steps(case)}
    found = [name for name, value in expected.items() if was[name] != value]
    where = f"of case '{case.scenario}, {case.implementation}'"
    reasons = [f"{name} {where} was {was[name]} and is {expected[name]}" for name in found]
    ops = plan.ops.get(case.implementation)
    return reasons + ([] if ops is None else list(_op_differences(case.ops, ops, where)))


def _op_differences(old: Mapping[str, str], now: Mapping[str, str], where: str) -> Iterator[str]:
    for role in {**old, **now}:
        if old.get(role) != now.get(role):
            yield f"{role} {where} was {old.get(role, 'no op')} and is {now.get(role, 'no op')}"


def _scenario_differences(old: Sequence[str], now: Sequence[str], lengths_differ: bool) -> Iterator[str]:
    other = [name for name in now if name not in old] or [name for name in old if name not in now]
    if other:
        place = "it has no" if other[0] not in old else "only it has"
        yield f"workload or axes differ, {place} scenario '{other[0]}'"
    elif lengths_differ:
        yield "workload differs: a scenario has other lengths or counts, or their order changed"


def _flags(words: Sequence[str]) -> Mapping[str, str]:
    """Return the values of each option, in their order."""
    flags: dict[str, str] = {}
    for flag, value in zip(words[::2], words[1::2], strict=True):
        flags[flag] = f"{flags[flag]} {value}" if flag in flags else value
    return flags
