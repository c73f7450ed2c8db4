"""What ends a run over several ranks, and the sentences that say so."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mla.command.exit_codes import Exit, interrupted
from mla.errors import MLAError
from mla_backends import BackendError
from mla_backends.errors import describe

MOST = 8  # ranks that a sentence names
INTERRUPTED: dict[int, str] = {
    Exit.INTERRUPTED: "interrupted",
    Exit.TERMINATED: "by SIGTERM",
    Exit.HUNG_UP: "by SIGHUP",
}


class RanksError(MLAError):
    """Ranks that do not find each other, or do not agree."""

    exit_code = 3

    def __init__(self, sentence: str, common: bool = False) -> None:
        """`common`: every rank meets it, and rank 0 says it for all."""
        super().__init__(sentence)
        self.common = common


class RankLost(MLAError):
    """Another rank is gone, or has failed. Rank 0 says so for all; others only what it cannot say."""

    def __init__(
        self, reason: str, code: int, by: int | None = None, ranks: Collection[int] | None = None
    ) -> None:
        """`by`: the rank that has said itself why it ends; None where one is gone without a word.

        `ranks`: those that are lost, where all others will find that out; None: they have to be told.
        """
        super().__init__(f"{reason.rstrip('.')}.")
        self.exit_code = code
        self.common = by is not None
        self.ranks = ranks


def listed(names: Sequence[str]) -> str:
    """Return "a, b and c"; of many, the first and how many more there are."""
    if len(names) > MOST:
        names = [*names[:MOST], f"{len(names) - MOST} more"]
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def numbered(ranks: Sequence[int]) -> str:
    """Return "rank 1" or "ranks 1, 2 and 3"."""
    return f"rank{'s' * (len(ranks) > 1)} {listed(list(map(str, ranks)))}"


def gone(names: Sequence[str]) -> str:
    """Return what is said of processes that are not there any more."""
    are, they_were, have = ("is", "it was", "has") if len(names) == 1 else ("are", "they were", "have")
    return f"{listed(names)} {are} gone: {they_were} killed, perhaps for want of memory, or {have} crashed"


def silent(names: Sequence[str], seconds: float) -> str:
    """Return what is said of ranks that have not shown a sign of life for so long."""
    have, it, is_ = (
        ("has", "it, or its node,", "is") if len(names) == 1 else ("have", "they, or their nodes,", "are")
    )
    return f"{listed(names)} {have} not been heard of for {seconds:.0f} s: {it} {is_} gone or stopped"


def late(ranks: Sequence[int], seconds: float, hosts: Sequence[str]) -> str:
    """Return what is said of ranks that never came, while others did, on these hosts."""
    have = "has" if len(ranks) == 1 else "have"
    return (
        f"{numbered(ranks)} {have} not come within {seconds:.0f} s, as those on {listed(hosts)} have: ended "
        "before that, or still loading, or without a way to this port; their own output says more."
    )


def word_of(error: BaseException) -> tuple[str, int]:
    """Return what to tell the other ranks of an error of this one, and the exit code for all."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED[interrupted()], interrupted()
    if isinstance(error, MLAError):
        return str(error).rstrip("."), int(error.exit_code)
    if isinstance(error, BackendError):
        return str(error).rstrip("."), Exit.BACKEND
    return describe(error), Exit.BACKEND
