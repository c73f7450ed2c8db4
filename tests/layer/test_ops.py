"""How ops are chosen: by the contract they serve, in the order offered, under a policy, never silently."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mla.errors import UnsupportedBatch, UnsupportedOps
from mla.layer.ops import Ops, choose
from mla.reference import REFERENCE
from mla_backends import BackendError, FusedOp
from mla_backends.api import OPS

LinearOp, LatentOp = type(REFERENCE["linear"]), type(REFERENCE["latent_attention"])


class Picky(LatentOp):  # type: ignore[misc, valid-type]
    """Right, but refuses odd head counts and more than one new token."""

    def unsupported_reasons(self, spec: Any) -> list[str]:
        return ["it needs an even head count"] if spec.num_heads % 2 else []

    def unsupported_batch(self, spec: Any, query_lens: Any, kv_lens: Any, page_size: Any = None) -> list[str]:
        return ["it serves decode only"] if max(query_lens) > 1 else []


class Outdated(LatentOp):  # type: ignore[misc, valid-type]
    contract = "latent_attention/0"


def test_the_reference_serves_every_op_of_the_contract() -> None:
    assert {name: op.contract for name, op in REFERENCE.items()} == OPS


def test_an_op_that_refuses_the_layer_is_passed_over_with_its_reason(tiny: Any) -> None:
    ops = Ops(tiny(), {"old": Outdated(), "picky": Picky()}, torch.float32, torch.device("cpu"))
    assert ops["latent_attention"].name == "reference"
    assert ops.all_reference()
    explained = "\n".join(ops.explain())
    assert "fused op 'old' not used because it implements latent_attention/0" in explained
    assert "fused op 'picky' not used because it needs an even head count" in explained


def test_what_the_chosen_ops_say_of_themselves_is_explained(tiny: Any) -> None:
    op, idle = LatentOp(), LatentOp()
    op.remarks, idle.remarks = ["it runs with a smaller tile\nthan planned"], ["never chosen"]
    ops = Ops(tiny(), {"mine": op, "idle": idle}, torch.float32, torch.device("cpu"))
    lines = ops.explain()
    assert lines[lines.index("latent_attention: mine") + 1] == "  it runs with a smaller tile than planned"
    assert ops.remarks() == {"mine": ["it runs with a smaller tile than planned"]}
    op.remarks = []
    assert ops.remarks() == {}


@pytest.mark.parametrize("remarks", [None, "one", [""], [1]])
def test_remarks_that_are_no_list_are_named(tiny: Any, remarks: Any) -> None:
    op = LatentOp()
    op.remarks = remarks
    ops = Ops(tiny(), {"mine": op}, torch.float32, torch.device("cpu"))
    with pytest.raises(BackendError) as error:
        ops.remarks()
    assert str(error.value) == (
        f"the backend's op 'mine': remarks returned {remarks!r}, not a list of sentences ([] for none)."
    )


def test_the_first_op_that_serves_the_layer_is_taken(tiny: Any) -> None:
    offered = {"old": Outdated(), "picky": Picky(), "plain": LatentOp(), "linear": LinearOp()}
    ops = Ops(tiny(num_attention_heads=4), offered, torch.float32, torch.device("cpu"))
    names = ops.names()
    assert names["latent_attention"] == "picky"
    assert names["o_proj"] == "linear"
    assert names["expanded_attention"] == "reference"
    assert not ops.all_reference()


def test_a_policy_can_insist_on_fused_ops(tiny: Any) -> None:
    def ops(policy: str, heads: int) -> Ops:
        offered = {"old": Outdated(), "picky": Picky(), "plain": LatentOp(), "linear": LinearOp()}
        return Ops(tiny(num_attention_heads=heads), offered, torch.float32, torch.device("cpu"), policy)

    assert ops("plain", 4)["latent_attention"].name == "plain"  # though the better one would serve
    assert ops("plain", 4)["o_proj"].name == "linear"  # what is not named goes on as before
    assert ops("picky, linear", 4)["latent_attention"].name == "picky"
    assert ops("fused", 3)["latent_attention"].name == "plain"
    assert ops("fused", 3)["rotate_query"].name == "reference"  # nobody offers one
    with pytest.raises(
        UnsupportedOps, match=r"no fused latent_attention .* --ops picky .* an even head count"
    ):
        ops("picky", 3)
    with pytest.raises(UnsupportedOps, match=r"offers no op 'pickey'. Did you mean 'picky'\?"):
        ops("pickey", 4)
    with pytest.raises(UnsupportedOps, match="--ops reference cannot be combined"):
        ops("reference,picky", 4)


def test_fused_is_an_error_where_none_serves(tiny: Any) -> None:
    offered = {"old": Outdated(), "picky": Picky()}
    with pytest.raises(UnsupportedOps, match=r"'old' not used because .*'picky' not used because"):
        Ops(tiny(num_attention_heads=3), offered, torch.float32, torch.device("cpu"), "fused")


def test_reference_policy_takes_no_fused_op(tiny: Any) -> None:
    offered: dict[str, FusedOp] = {"plain": LatentOp()}
    assert choose("latent_attention", None, offered, "reference").name == "reference"


def test_an_op_that_refuses_a_batch_raises_and_never_falls_back(make_case: Any, tiny: Any) -> None:
    config = tiny(num_attention_heads=4)
    case = make_case([1, 1], [20, 5], config, ops={"picky": Picky()}, attention="absorbed")
    assert case.run().isfinite().all()
    case = make_case([1, 2], [20, 5], config, ops={"picky": Picky()}, attention="absorbed")
    with pytest.raises(UnsupportedBatch, match=r"'picky' .* refuses this batch: it serves decode only"):
        case.run()


@pytest.mark.parametrize(
    ("name", "contract", "reason"),
    [
        (
            "mine",
            "latent_atention/1",
            "has unknown contract 'latent_atention/1'. Did you mean 'latent_att",
        ),
        ("reference", "linear/1", "may not be named 'reference'"),
    ],
)
def test_an_op_that_could_not_be_told_apart_or_would_never_run_is_refused(
    tiny: Any, name: str, contract: str, reason: str
) -> None:
    class Odd(FusedOp):
        def __call__(self, *args: Any, **tensors: Any) -> None:
            raise AssertionError("never called")

    Odd.contract = contract
    with pytest.raises(BackendError, match=reason):
        Ops(tiny(), {name: Odd()}, torch.float32, torch.device("cpu"))
