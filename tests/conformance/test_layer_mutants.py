"""Deliberately wrong layers: each fault must fail the check that is there for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
from wrong_ops import extents, habits, layers

from mla.conformance.registry import all_checks
from mla.conformance.report import CheckResult

Run = Callable[..., list[CheckResult]]
MUTANTS: Mapping[str, list[Callable[[], Any]]] = {
    "layer.prefill": [layers.FutureLeak, layers.Unrotated],
    "layer.history": [layers.EarlyKeys],
    "layer.mixed": [layers.RowsMoved],
    "layer.decode": [layers.LastPageDropped],
    "layer.pages": [layers.ConsecutivePages],
    "layer.chunks": [layers.BaseTwo],
    "layer.variant": [layers.NoBias, layers.AlwaysInterleaved],
    "layer.cached": [layers.Unrotated, layers.Unnormed],
    "layer.untouched": [layers.TwoSlots],
    "layer.again": [layers.Accumulating],
    "layer.shared_plan": [layers.FirstCache],
    "layer.two_layers": [
        partial(habits.packs_once, "linear", "shape"),
        partial(habits.packs_once, "batched_linear", "shape"),
        partial(habits.first_weight, "linear", "shape"),
    ],
    "layer.requests": [
        layers.FewRequests,
        layers.FewerRequests,
        partial(extents.lost_from, "write_latent", 128),
        partial(extents.lost_from, "rotate_query", 100),
    ],
    "layer.rows": [
        partial(extents.lost_from, "linear", 512),
        partial(extents.lost_from, "write_latent", 300),
        partial(extents.lost_from, "rotate_query", 513),
    ],
    "layer.equal": [layers.Ties, layers.ShiftedTies],
    "layer.no_tokens": [layers.FirstSlotIfEmpty, layers.ScratchOfNothing],
    "layer.weights": [layers.Lossy],
    "layer.update": [layers.PlanOfTheObject],
    "layer.graph": [layers.OnTheHost],
    "layer.graph_lengths": [layers.FrozenLengths],
}
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
