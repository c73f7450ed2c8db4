"""What fails on a rank and costs a case, not the run: an op refuses, or memory is short.

On one device the next case runs after that. On several it can if every rank knows, and none waits in a
collective for one that has given up.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from mla.bench.measure import hooks as refusals
from mla.errors import MLAError, OutOfMemory, UnsupportedBatch, UnsupportedOps
from mla_backends.errors import first_line


class Failure(msgspec.Struct, frozen=True):
    """Why a rank could not do its part of a case."""

    sentence: str
    refused: bool  # by an op; else memory is short
    entered: int = 0  # collectives of a forward, until it failed


def failure(error: Exception, implementation: str, entered: int = 0) -> Failure | None:
    """Return what to tell the other ranks of an error; None for one that ends the run."""
    reason = str(error) if isinstance(error, UnsupportedOps) else refusals.reason(error, implementation)
    if reason:
        return Failure(reason, True, entered)
    if refusals.too_large(error):
        return Failure(first_line(error) or type(error).__name__, False, entered)
    return None


def error_of(found: Sequence[Failure | None]) -> MLAError | None:
    """Return what the failures of all ranks are on rank 0, with the first that failed; None if none did."""
    failed = [(rank, one) for rank, one in enumerate(found) if one is not None]
    if not failed:
        return None
    rank, first = failed[0]
    alike = len({one.sentence for _, one in failed}) == 1 and len(failed) == len(found)
    sentence = first.sentence if alike else f"rank {rank}: {first.sentence}"
    return UnsupportedBatch(sentence) if first.refused else OutOfMemory(sentence)
