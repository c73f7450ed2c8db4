"""Deliberately wrong projections, norms, rotations and cache writes: each must fail its own check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from wrong_ops.base import FORMULAS, SMALL_OPS
from wrong_ops.formulas import MUTANTS

from mla.conformance.report import CheckResult

Run = Callable[..., list[CheckResult]]
# Mutants so specific that no other check of their group may notice them.
ALONE = ("rms_norm.eps", "rotate_query.in_place", "write_latent.eps")
CASES = [(name, number) for name, mutants in MUTANTS.items() for number in range(len(mutants))]


def failed(results: list[CheckResult]) -> set[str]:
    """Return what failed by its numbers; a mutant that raises proves nothing."""
    assert not [one.reason for one in results if "raised" in one.reason]
    return {one.check for one in results if one.of == "mine" and one.status == "fail"}


def test_every_formula_has_a_mutant() -> None:
    assert set(MUTANTS) - {f"{kind}.inputs" for kind in SMALL_OPS} == FORMULAS


@pytest.mark.parametrize(("check", "number"), CASES)
def test_the_check_fails_a_wrong_op(judge: Run, sound: Any, check: str, number: int) -> None:
    backend = sound(ops={"mine": MUTANTS[check][number]})
    assert failed(judge(backend, f"{check}[mine-*]")) == {check}


@pytest.mark.parametrize("check", ALONE)
def test_no_other_check_fails_for_what_is_its_alone(judge: Run, sound: Any, check: str) -> None:
    backend = sound(ops={"mine": MUTANTS[check][0]})
    assert failed(judge(backend, f"{check.partition('.')[0]}.*[mine-*]")) == {check}
