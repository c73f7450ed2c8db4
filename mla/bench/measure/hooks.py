"""Callbacks of the engine, none of them inside a timed region; and what costs a case and not the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mla.bench.measure.target import Target
from mla.bench.measure.variants import Steps
from mla.bench.subjects.base import Implementation
from mla.bench.workload.implementations import parse_one
from mla.command import exit_codes
from mla.errors import OutOfMemory, UnsupportedBatch
from mla.verify.verdict import Check
from mla_backends import BackendError

# Implementation -> what it runs of the headline, and of nothing else, and the clause that says why.
Shorter = Mapping[str, tuple[Steps, str]]


@dataclass(frozen=True)
class Hooks:
    """By default the engine runs to the end, without a watchdog."""

    # Asked before all that may take long, with its seconds and name: why it does not fit, or "".
    should_stop: Callable[[float, str], str] = lambda seconds, what: ""
    enter: Callable[[str], None] = lambda name: None  # the implementation that runs from now on
    heartbeat: Callable[[], None] = lambda: None  # called between forwards
    # An implementation whose pass was wrong, while its inputs, cache and collected outputs are in place.
    failed: Callable[[Implementation, Check], None] = lambda one, check: None
    # Asked after every warm-up, with the milliseconds of a forward of each implementation that is
    # not wrong, in their order, and how many forwards of the last one fit into the time that is left.
    shorten: Callable[[Mapping[str, float], float], Shorter] = lambda ms, most: {}
    warmups: int = 0  # that the user asked for: they run however long they take
    say: Callable[[str], None] = lambda text: None  # what a reader of the numbers should know
    detail: Callable[[str], None] = lambda text: None  # what only -v shows
    first: str = ""  # the run's first implementation; by default the first that is measured
    target: Target = Target()  # noqa: RUF009  # without limits, nothing of it changes
    oracle: float = 0.0  # seconds that the oracle of the evidence takes, which follows the checks


def reason(error: Exception, implementation: str) -> str:
    """Return why an op of `implementation` refuses its batch, and the cure; "" for any other error.

    A `BackendError` that an op raises is a refusal, as the contract says.
    """
    if isinstance(error, UnsupportedBatch):
        return str(error)
    if isinstance(error, BackendError) and exit_codes.in_op(error):
        op = exit_codes.op_name(error)
        return f"{op}{': ' if op else ''}{str(error).rstrip('.')}. {_cure(implementation)}"
    return ""


def too_large(error: Exception) -> bool:
    """Return whether memory was short, of the host or of a device."""
    return isinstance(error, (OutOfMemory, MemoryError)) or type(error).__name__ == "OutOfMemoryError"


def _cure(implementation: str) -> str:
    if parse_one(implementation).ops:
        return f"Leave `{implementation}` out of --implementations."
    return "Use the reference ops for it (`--ops reference`)."
