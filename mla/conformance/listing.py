"""`--list`: what the suite asks, and with a backend which cases it has for each of its ops and dtypes."""

from __future__ import annotations

from collections.abc import Sequence

from mla.command.console import out
from mla.command.exit_codes import Exit
from mla.conformance.kinds import KINDS
from mla.conformance.registry import LAYER, OP, all_checks, matches
from mla.conformance.selection import case_id, split
from mla.conformance.suite import Instance
from mla.conformance.trial import BackendUnderTest
from mla.errors import UsageError


def checks(only: Sequence[str]) -> Exit:
    """Print id, kind, description and bug of every check, and how many there are of each kind.

    Raises `UsageError` for a single case: only a backend's ops have cases.
    """
    for pattern in only:
        if split(pattern)[1] is not None:
            raise UsageError(f"'{pattern}' is a case; --list shows cases with --backend alone.")
    named = [split(pattern)[0].partition("[")[0] for pattern in only]
    listed = [one for one in all_checks() if not named or any(matches(word, one.id) for word in named)]
    for one in listed:
        out(f"{one.id} ({one.fails})\n  {one.description}\n  Catches {one.catches}.\n")
    counts = [(kind, sum(one.fails == kind for one in listed)) for kind in KINDS]
    of_kinds = ", ".join(f"{count} {kind}" for kind, count in counts if count)
    out(f"{len(listed)} check{'s' * (len(listed) != 1)}: {of_kinds}\n")
    return Exit.OK


def cases(planned: Sequence[Instance], subject: BackendUnderTest) -> Exit:
    """Print the id of every case of what would run."""
    count = 0
    for one in planned:
        of_ops = one.check.scope in (OP, LAYER)  # the cases of others are known when they have run
        labels = one.labels(subject) if of_ops else ()
        chosen = [n for n in range(1, len(labels) + 1) if one.chosen is None or n in one.chosen]
        out(f"{one.id} ({one.check.fails})\n")
        for number in chosen:
            out(f"  {case_id(one.id, number)}  {labels[number - 1]}\n")
        count += max(1, len(chosen))
    out(f"{len(planned)} checks, {count} cases\n")
    return Exit.OK
