"""What ends a run over several ranks, what costs it a case alone, and the sentences that say so."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from mla.bench.measure.engine import refusal, too_large
from mla.command.exit_codes import Exit, interrupted
from mla.errors import MLAError, OutOfMemory, UnsupportedBatch, UnsupportedOps
from mla_backends import BackendError
from mla_backends.errors import describe, first_line

MOST = 8  # ranks that a sentence names
INTERRUPTED: dict[int, str] = {
    Exit.INTERRUPTED: "interrupted",
    Exit.TERMINATED: "by SIGTERM",
    Exit.HUNG_UP: "by SIGHUP",
}


class RanksError(MLAError):
    """Ranks that do not find each other, do not agree, or are lost."""

    def __init__(self, sentence: str, code: int = 3, common: bool = False) -> None:
        """`common`: every rank meets it, or has been told, and rank 0 says it for all."""
        super().__init__(f"{sentence.rstrip('.')}.")
        self.exit_code, self.common = code, common


def listed(names: Sequence[str]) -> str:
    """Return "a, b and c"; of many, the first and how many more there are."""
    if len(names) > MOST:
        names = [*names[:MOST], f"{len(names) - MOST} more"]
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def numbered(ranks: Sequence[int]) -> str:
    """Return "rank 1" or "ranks 1, 2 and 3"."""
    return f"rank{'s' * (len(ranks) > 1)} {listed(list(map(str, ranks)))}"


def word_of(error: BaseException) -> tuple[str, int]:
    """Return what to tell the other ranks of an error of this one, and the exit code for all."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED[interrupted()], interrupted()
    if isinstance(error, MLAError):
        return str(error).rstrip("."), int(error.exit_code)
    if isinstance(error, BackendError):
        return str(error).rstrip("."), Exit.BACKEND
    return describe(error), Exit.BACKEND


class Failure(msgspec.Struct, frozen=True):
    """Why a rank could not do its part of a case: an op refuses, or memory is short.

    On one device the next case runs after that. On several it can if every rank knows, and none waits in a
    collective for one that has given up.
    """

    sentence: str
    refused: bool  # by an op; else memory is short
    entered: int = 0  # collectives of a forward, until it failed


def failure(error: Exception, implementation: str, entered: int = 0) -> Failure | None:
    """Return what to tell the other ranks of an error; None for one that ends the run."""
    reason = str(error) if isinstance(error, UnsupportedOps) else refusal(error, implementation)
    if reason:
        return Failure(reason, True, entered)
    if too_large(error):
        return Failure(first_line(error) or type(error).__name__, False, entered)
    return None


def error_of(failures: Sequence[Failure | None]) -> MLAError | None:
    """Return what the failures of all ranks are on rank 0, with the first that failed; None if none did."""
    failed = [(rank, each) for rank, each in enumerate(failures) if each is not None]
    if not failed:
        return None
    rank, first = failed[0]
    alike = len({each.sentence for _, each in failed}) == 1 and len(failed) == len(failures)
    sentence = first.sentence if alike else f"rank {rank}: {first.sentence}"
    return UnsupportedBatch(sentence) if first.refused else OutOfMemory(sentence)
