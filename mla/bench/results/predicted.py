"""Cases whose times are predicted, and the word that every place says with them. Needs no torch."""

from __future__ import annotations

import msgspec

from mla.bench.results.schema import Agreement, Case, Run

WORD = "predicted"
_MARK = f" ({WORD})"


def is_predicted(case: Case) -> bool:
    """Return whether a case's times are a simulation's: no such ranks were there."""
    return case.spread is not None and case.spread.predicted


def labelled(run: Run) -> Run:
    """Return a run for readers: implementations whose times are predicted say so in their names."""
    if not any(map(is_predicted, run.cases)):
        return run
    names = {(case.scenario, case.implementation): label(case) for case in run.cases}

    def named(case: Case) -> Case:
        agreement = [_named(one, names.get((case.scenario, one.implementation))) for one in case.agreement]
        return msgspec.structs.replace(case, implementation=label(case), agreement=agreement)

    return msgspec.structs.replace(run, cases=list(map(named, run.cases)))


def label(case: Case) -> str:
    """Return a case's implementation, with the word if its times are predicted."""
    return unlabelled(case.implementation) + _MARK * is_predicted(case)


def unlabelled(implementation: str) -> str:
    """Return the implementation that a label is of."""
    return implementation.removesuffix(_MARK)


def _named(one: Agreement, name: str | None) -> Agreement:
    return one if name is None else msgspec.structs.replace(one, implementation=name)
