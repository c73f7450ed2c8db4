"""How a run ended, as a result and as an exit code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mla.bench import results
from mla.bench.workload.implementations import parse_one
from mla.command import error_origin
from mla.command.console import note
from mla.command.exit_codes import Exit, end_early
from mla.errors import MLAError
from mla_backends import BackendError
from mla_backends.errors import describe


@dataclass(frozen=True)
class Outcome:
    """A run, complete or cut short by an interrupt or by an error; finished cases are kept."""

    run: results.Run
    interrupted: bool = False
    failure: MLAError | BackendError | None = None


class RunFailed(MLAError):
    """An op, a backend or torch raised while a scenario ran."""

    exit_code = 3


def failure_of(scenario: str, error: Exception) -> MLAError | BackendError:
    """Return what to print: our own sentence, or what was raised and where."""
    if isinstance(error, BackendError) and (op := error_origin.op_name(error)):
        return RunFailed(f"scenario '{scenario}' failed: {op}: {str(error).rstrip('.')}.")
    if isinstance(error, (MLAError, BackendError)):
        return error.with_traceback(None)  # whose frames would keep weights alive
    return RunFailed(f"scenario '{scenario}' failed: {describe(error)} ({error_origin.place(error)}).")


def verdict(outcome: Outcome) -> Exit:
    """Return the exit code of a run, and say on stderr why it is not 0. Raises what made the run fail."""
    if outcome.failure is not None:
        raise outcome.failure
    if outcome.interrupted:
        return end_early()
    found = {case.check.status for case in outcome.run.cases}
    if "wrong" in found:
        note(f"wrong result: {_cases(outcome, 'wrong')} disagreed with float64 and got no number")
    if "doubtful" in found:
        note(f"suspect timing: rejected for {_cases(outcome, 'doubtful')} (see above)")
    if "wrong" in found:
        return Exit.WRONG
    if "doubtful" in found:
        return Exit.DOUBTFUL
    if any(case.latency_ms for case in subjects(outcome.run.cases)):
        return Exit.OK
    if any(case.latency_ms for case in outcome.run.cases):
        names = dict.fromkeys(case.implementation for case in subjects(outcome.run.cases))
        note(f"{', '.join(names)} produced no result; only the baselines did")
    return Exit.NOTHING_RAN


def _cases(outcome: Outcome, status: str) -> str:
    """Return the number of cases with a status, such as "1 case"."""
    count = sum(case.check.status == status for case in outcome.run.cases)
    return f"{count} case{'s' * (count > 1)}"


def subjects(cases: Sequence[results.Case]) -> list[results.Case]:
    """Return the cases that a run is about: those of `mla`, or all if it was not asked for `mla`.

    A run that measured only baselines (`mla-reference`, `transformers`) did not do what it was for.
    """
    ours = [case for case in cases if parse_one(case.implementation).base == "mla"]
    return ours or list(cases)
