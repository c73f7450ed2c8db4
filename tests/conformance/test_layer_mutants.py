"""Deliberately wrong layers: each fault must fail the check that is there for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from wrong_ops.of_layers import MUTANTS

from mla.conformance.registry import all_checks
from mla.conformance.report import CheckResult

Run = Callable[..., list[CheckResult]]
# Faults that only their own check can see.
ALONE = (
    "layer.chunks",
    "layer.graph_lengths",
    "layer.no_tokens",
    "layer.update",
    "layer.variant",
    "layer.weights",
)
CASES = [
    pytest.param(name, mutant, id=f"{name}-{getattr(mutant, '__name__', number)}")
    for name, mutants in MUTANTS.items()
    for number, mutant in enumerate(mutants)
]


def failed(results: list[CheckResult]) -> set[str]:
    """Return what failed by its numbers; a mutant that raises proves nothing."""
    assert not [one.reason for one in results if "raised" in one.reason]
    return {one.check for one in results if one.status == "fail"}


def test_every_check_of_the_layer_has_a_mutant() -> None:
    assert set(MUTANTS) == {one.id for one in all_checks() if one.id.startswith("layer.")}


@pytest.mark.parametrize(("check", "mutant"), CASES)
def test_the_check_fails_a_wrong_layer(judge: Run, sound: Any, check: str, mutant: Callable[[], Any]) -> None:
    assert failed(judge(sound(ops={"mine": mutant()}), check)) == {check}


@pytest.mark.parametrize("check", ALONE)
def test_no_other_check_fails_for_what_is_its_alone(judge: Run, sound: Any, check: str) -> None:
    assert failed(judge(sound(ops={"mine": MUTANTS[check][0]()}), "layer")) == {check}
