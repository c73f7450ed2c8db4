"""The suite on the backend whose ops are interpreted kernels, with fewer cases than by its command."""

from __future__ import annotations

from collections.abc import Iterable

import interpreted
import pytest
import torch
from smaller_cases import make_smaller

from mla.conformance.checks.attention import grid, index, tiles
from mla.conformance.checks.small_ops import rows
from mla.conformance.report import CheckResult
from mla.conformance.suite import Instance, carry_out, instances
from mla.conformance.trial import BackendUnderTest
from mla.conformance.xfails import Xfails

# An interpreter's time goes by programs, of which these cases start thousands on the quick grid.
SMALLER = (
    (tiles, "FEW_HEADS", (1, 12, 20)),
    (tiles, "USUAL_HEADS", (12,)),
    (tiles, "MANY_HEADS", ((65, 4),)),
    (tiles, "FEW_TOKENS", (1, 2, 3, 15, 16, 17)),
    (grid, "REQUESTS", (20, 20)),
    (grid, "REQUESTS_OF", ((16, 20),)),
    (index, "CACHES", ((64, 70), (1, 300))),
    (rows, "FEW", (1, 2, 16, 17)),
    (rows, "DRAWN", 67),
)
# What starts most of all, and is the same as other checks but for a number of programs.
LEFT_OUT = {"rotate_query.rows_and_heads", "latent.positions", "expanded.positions"}
GRAPHS = {"latent.graph", "latent.graph_lengths"}  # this device has none; an emulated one has
LAYERS = ("layer.prefill", "layer.decode", "layer.mixed", "layer.chunks", "layer.two_layers")


@pytest.fixture(autouse=True)
def _smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    make_smaller(monkeypatch)
    for room, name, value in SMALLER:
        monkeypatch.setattr(room, name, value)


def subject() -> BackendUnderTest:
    """Return the backend as one that is slow in bfloat16, of which a handful of cases of each check run."""
    return BackendUnderTest(
        interpreted.Interpreted(), "interpreted", quick=True, slow=frozenset({torch.bfloat16})
    )


def results(found: BackendUnderTest, chosen: Iterable[Instance]) -> dict[str, CheckResult]:
    return {one.id: carry_out(one, found, Xfails()) for one in chosen}


def test_every_kernel_keeps_the_contract() -> None:
    device = subject()
    chosen = [
        one
        for one in instances(device, (torch.bfloat16,))
        if one.of.startswith("triton") and one.check.id not in LEFT_OUT | GRAPHS
    ]
    found = results(device, chosen)
    assert {one.id: one.reason for one in found.values() if one.status != "pass"} == {}
    assert len(found) >= 100
    assert not any(one.cases.refused for one in found.values())


def test_a_layer_of_interpreted_kernels_keeps_the_contract() -> None:
    device = subject()
    found = results(device, instances(device, (torch.bfloat16,), LAYERS))
    assert {one.id: one.reason for one in found.values() if one.status != "pass"} == {}
