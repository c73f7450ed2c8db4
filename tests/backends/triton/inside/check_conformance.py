"""The suite on the backend whose ops are interpreted kernels, with fewer cases than by its command."""

from __future__ import annotations

from collections.abc import Iterable

import interpreted
import pytest
import torch
from smaller_cases import make_smaller

from mla.conformance.checks import attention, small_ops
from mla.conformance.report import CheckResult
from mla.conformance.selection import Xfails
from mla.conformance.suite import Instance, carry_out, instances
from mla.conformance.trial import BackendUnderTest

# An interpreter's time goes by programs, of which these cases start thousands on the quick grid.
SMALLER = (
    (attention, "FEW_HEADS", (1, 12, 20)),
    (attention, "USUAL_HEADS", (12,)),
    (attention, "MANY_HEADS", ((65, 4),)),
    (attention, "FEW_TOKENS", (1, 2, 3, 15, 16, 17)),
    (attention, "REQUESTS", (20, 20)),
    (attention, "REQUESTS_OF", ((16, 20),)),
    (attention, "CACHES", ((64, 70), (1, 300))),
    (small_ops, "FEW", (1, 2, 16, 17)),
    (small_ops, "MOST_ROWS", 67),
)
# Checks that start most of all, and differ from others in a number of programs.
LEFT_OUT = {"rotate_query.rows_and_heads", "latent.positions", "expanded.positions", "expanded.lse"}
GRAPHS = {"latent.graph", "latent.graph_lengths"}  # this device has none; an emulated one has
HOST = {"state", "order", "contract"}  # of ops without a plan, what the host does is nothing to interpret
LAYERS = ("layer.prefill", "layer.decode", "layer.mixed")


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


def is_of_a_kernel(one: Instance) -> bool:
    """Return whether a check is about one of the kernels, and worth its time."""
    planned = one.of == "triton_latent" or one.check.fails not in HOST
    return one.of.startswith("triton_") and planned and one.check.id not in LEFT_OUT | GRAPHS


def results(found: BackendUnderTest, chosen: Iterable[Instance]) -> dict[str, CheckResult]:
    return {one.id: carry_out(one, found, Xfails()) for one in chosen}


def test_every_kernel_keeps_the_contract() -> None:
    device = subject()
    chosen = [one for one in instances(device, (torch.bfloat16,)) if is_of_a_kernel(one)]
    found = results(device, [one for one in chosen if not one.check.id.endswith(".drawn")])
    assert {one.id: one.reason for one in found.values() if one.status != "pass"} == {}
    assert len(found) >= 80
    assert not any(one.cases.refused for one in found.values())


def test_a_layer_of_interpreted_kernels_keeps_the_contract() -> None:
    device = subject()
    found = results(device, instances(device, (torch.bfloat16,), LAYERS))
    assert {one.id: one.reason for one in found.values() if one.status != "pass"} == {}
