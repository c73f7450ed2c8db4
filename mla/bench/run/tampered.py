"""No number for a case while a plugin has replaced part of what measures it."""

from __future__ import annotations

from collections.abc import Sequence

from mla.bench import results
from mla.bench.run import judging
from mla.command import tampering

MOST = 3  # replaced functions that a reason names


def withhold(cases: Sequence[results.Case], elsewhere: Sequence[str] = ()) -> None:
    """Take the numbers of cases that have some, if a plugin has replaced functions of ours or the clock.

    `elsewhere`: what it has replaced in other processes that take part.
    """
    replaced = [*tampering.found(), *dict.fromkeys(elsewhere)]
    if not replaced:
        return
    more = f" and {len(replaced) - MOST} more" if len(replaced) > MOST else ""
    reason = f"code of a plugin has replaced what measures it: {', '.join(replaced[:MOST])}{more}"
    for case in cases:
        if case.check.status == "ok":
            judging.withhold(case, reason)
