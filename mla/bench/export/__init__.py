"""Results in the formats of other tools. Reads results only, so it needs no torch."""

from __future__ import annotations

from mla.bench.results.schema import Case


def withheld(case: Case) -> bool:
    """Return whether the runner withheld a case's numbers: then none of its timings leaves the file."""
    return case.check.status in ("wrong", "doubtful")
