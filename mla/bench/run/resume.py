"""Resume a run from its file: what may be kept, and whether it is the same run. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mla.bench.results.schema import Case, Run
from mla.bench.workload.grid import Point
from mla.errors import ResultError

# Facts of the environment that differ between jobs without meaning anything.
VOLATILE = ("slurm_", "torchrun_")


def kept_cases(path: Path, old: Run, now: Run, scenarios: Sequence[Point]) -> list[Case]:
    """Return the complete cases of a file. Raises `ResultError` if it holds another run than `now`."""
    if old.plan is None:
        raise ResultError(f"cannot resume '{path}': it does not say what was planned; start a new run.")
    if reasons := list(_differences(old, now)):
        raise ResultError(
            f"cannot resume '{path}', it holds another run: {'; '.join(reasons)}. Repeat its options, "
            "or write a new file."
        )
    rounds = {scenario.name: scenario.rounds for scenario in scenarios}
    return [case for case in old.cases if _complete(case, rounds[case.scenario])]


def warning(old: Run, now: Run) -> str | None:
    """Return what may make the new cases differ from the kept ones."""
    facts = {"commit": (old.git_commit, now.git_commit)}
    for key in sorted({*old.environment, *now.environment}):
        if not key.startswith(VOLATILE):
            facts[key] = (old.environment.get(key), now.environment.get(key))
    changed = [
        f"{name} was {before} and is {after}" for name, (before, after) in facts.items() if before != after
    ]
    return (
        f"warning: kept cases were measured under other conditions: {'; '.join(changed)}" if changed else None
    )


def _complete(case: Case, rounds: int) -> bool:
    """Return whether a case is complete; what a budget cut short is measured again."""
    measured = case.check.status == "ok" and case.passes >= rounds
    return not case.interrupted and (measured or case.check.status == "wrong")


def _differences(old: Run, now: Run) -> Iterator[str]:
    """Yield why a file cannot be completed by this run."""
    assert old.plan is not None
    assert now.plan is not None
    before, after = _flags(old.plan.options), _flags(now.plan.options)
    for flag in {**before, **after}:
        if before.get(flag) != after.get(flag):
            yield f"{flag} was {before.get(flag, 'not given')} and is {after.get(flag, 'not given')}"
    for name, first, second in (
        ("device", old.backend.device, now.backend.device),
        ("implementations", ",".join(old.plan.implementations), ",".join(now.plan.implementations)),
    ):
        if first != second:
            yield f"{name} was {first} and is {second}"
    changed = [key for key in {**old.config, **now.config} if old.config.get(key) != now.config.get(key)]
    if changed:
        yield f"config differs in {', '.join(changed)}"
    yield from _scenario_differences(
        old.plan.scenarios, now.plan.scenarios, old.plan.digest != now.plan.digest
    )


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
