"""How a run ended, as a result and as an exit code."""

from __future__ import annotations

from dataclasses import dataclass

from mla.bench import results
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
    if isinstance(error, (MLAError, BackendError)):
        return error.with_traceback(None)  # whose frames would keep weights alive
    return RunFailed(f"scenario '{scenario}' failed: {describe(error)} ({error_origin.place(error)}).")


def verdict(outcome: Outcome) -> Exit:
    """Return the exit code of a run, and say on stderr why it is not 0. Raises what made the run fail."""
    if outcome.failure is not None:
        raise outcome.failure
    if outcome.interrupted:
        return end_early()
    if any(case.check.status == "wrong" for case in outcome.run.cases):
        note("wrong result: at least one implementation disagrees with the oracle and got no number")
        return Exit.WRONG
    return Exit.OK if any(case.latency_ms for case in outcome.run.cases) else Exit.NOTHING_RAN
