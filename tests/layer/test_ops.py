"""How ops are chosen: by the contract they serve, in the order offered, under a policy, never silently."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import pytest
import torch
from faulty_backend import FaultyOp

from mla import MLA, MLAConfig
from mla.errors import UnknownOp, UnsupportedBatch, UnsupportedOps
from mla.layer.ops import Ops
from mla.reference import REFERENCE
from mla.weights import random_state_dict
from mla_backends import BackendError, FusedOp
from mla_backends.api import OPS
from mla_backends.testing import HostBackend

LinearOp, LatentOp = type(REFERENCE["linear"]), type(REFERENCE["latent_attention"])
CPU = torch.device("cpu")


def chosen(tiny: Any, offered: Any, policy: str = "auto", heads: int = 3, **more: Any) -> Ops:
    return Ops(tiny(num_attention_heads=heads), offered, torch.float32, CPU, policy, **more)


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
    ops = chosen(tiny, {"old": Outdated(), "picky": Picky()})
    assert ops["latent_attention"].name == "reference"
    assert {*ops.names().values()} == {"reference"}
    explained = "\n".join(ops.explain())
    assert "fused op 'old' not used because it implements latent_attention/0" in explained
    assert "fused op 'picky' not used because it needs an even head count" in explained


def test_what_the_chosen_ops_say_of_themselves_is_explained(tiny: Any) -> None:
    op, idle = LatentOp(), LatentOp()
    op.remarks, idle.remarks = ["it runs with a smaller tile\nthan planned"], ["never chosen"]
    ops = chosen(tiny, {"mine": op, "idle": idle})
    lines = ops.explain()
    assert lines[lines.index("latent_attention: mine") + 1] == "  it runs with a smaller tile than planned"
    assert ops.remarks() == {"mine": ["it runs with a smaller tile than planned"]}
    op.remarks = []
    assert ops.remarks() == {}


@pytest.mark.parametrize("remarks", [None, "one", [""], [1]])
def test_remarks_that_are_no_list_are_named(tiny: Any, remarks: Any) -> None:
    op = LatentOp()
    op.remarks = remarks
    ops = chosen(tiny, {"mine": op})
    with pytest.raises(BackendError) as error:
        ops.remarks()
    assert str(error.value) == (
        f"the backend's op 'mine': remarks returned {remarks!r}, not a list of sentences ([] for none)."
    )


def test_the_first_op_that_serves_the_layer_is_taken(tiny: Any) -> None:
    offered = {"old": Outdated(), "picky": Picky(), "plain": LatentOp(), "linear": LinearOp()}
    ops = chosen(tiny, offered, heads=4)
    names = ops.names()
    assert names["latent_attention"] == "picky"
    assert names["o_proj"] == "linear"
    assert names["expanded_attention"] == "reference"
    assert {*ops.names().values()} != {"reference"}


def test_a_policy_can_insist_on_fused_ops(tiny: Any) -> None:
    offered = {"old": Outdated(), "picky": Picky(), "plain": LatentOp(), "linear": LinearOp()}
    of = partial(chosen, tiny, offered)
    assert of("plain", 4)["latent_attention"].name == "plain"  # though the better one would serve
    assert of("plain", 4)["o_proj"].name == "linear"  # what is not named goes on as before
    assert of("picky, linear", 4)["latent_attention"].name == "picky"
    assert of("fused", 3)["latent_attention"].name == "plain"
    assert of("fused", 3)["rotate_query"].name == "reference"  # nobody offers one
    with pytest.raises(
        UnsupportedOps, match=r"no fused latent_attention .* --ops picky .* an even head count"
    ):
        of("picky", 3)
    with pytest.raises(UnsupportedOps, match=r"unknown op 'pickey'. Did you mean 'picky'\?"):
        of("pickey", 4)
    with pytest.raises(UnsupportedOps, match=r"unknown op 'reference'\. --ops takes"):
        of("reference,picky", 4)


def test_fused_is_an_error_where_none_serves(tiny: Any) -> None:
    offered = {"old": Outdated(), "picky": Picky()}
    with pytest.raises(UnsupportedOps, match=r"'old' not used because .*'picky' not used because"):
        chosen(tiny, offered, "fused", 3)


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
        ("mine", "latent_atention/1", "unknown contract 'latent_atention/1'. Did you mean 'lat"),
        ("reference", "linear/1", "needs a name other than 'reference'"),
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
        chosen(tiny, {name: Odd()})


# ----------------------------------------------------------------------------------- test preflight
# Asked before an op is chosen, once per process, op and spec; whatever it answers is a reason.
class Compiled(LatentOp):  # type: ignore[misc, valid-type]
    """Needs a compiler that is there or not; says what it was asked."""

    compiles = "it compiles"

    def __init__(self, answer: Any = (), odd_heads: bool = True) -> None:
        self.answer, self.odd_heads = answer, odd_heads
        self.asked: list[Any] = []

    def unsupported_reasons(self, spec: Any) -> list[str]:
        return [] if self.odd_heads or spec.num_heads % 2 == 0 else ["it needs an even head count"]

    def preflight(self, spec: Any) -> Any:
        self.asked.append(spec)
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


def test_a_preflight_that_fails_is_a_reason_and_the_next_op_is_taken(tiny: Any) -> None:
    bad, good = Compiled(["there is no compiler:\ninstall one"]), Compiled()
    taken = chosen(tiny, {"bad": bad, "good": good})["latent_attention"]
    assert taken.name == "good"
    assert taken.reasons == ("fused op 'bad' not used because there is no compiler: install one",)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("Ninja build failed.\n[1/2] nvcc ..."), "RuntimeError: Ninja build failed."),
        (SystemExit(1), "SystemExit: 1"),
        (OSError(), "OSError"),
    ],
)
def test_whatever_a_preflight_raises_is_a_reason(tiny: Any, error: BaseException, text: str) -> None:
    taken = chosen(tiny, {"bad": Compiled(error)})["latent_attention"]
    assert taken.name == "reference"
    assert taken.reasons == (f"fused op 'bad' not used because its preflight raised {text}",)


def test_an_answer_that_is_no_list_is_a_reason_too(tiny: Any) -> None:
    (reason,) = chosen(tiny, {"bad": Compiled(None)})["latent_attention"].reasons
    assert reason.endswith("its preflight raised TypeError: 'NoneType' object is not iterable")


def test_an_op_that_is_required_fails_with_its_preflight(tiny: Any) -> None:
    for policy in ("fused", "bad"):
        with pytest.raises(UnsupportedOps, match="'bad' not used because there is no compiler"):
            chosen(tiny, {"bad": Compiled(["there is no compiler"])}, policy)


def test_it_is_asked_once_per_op_and_spec(tiny: Any) -> None:
    first, other = Compiled(), Compiled(["no"])
    for _ in range(3):
        chosen(tiny, {"one": first})
        chosen(tiny, {"other": other})
    chosen(tiny, {"one": first}, heads=4)
    assert [spec.num_heads for spec in first.asked] == [3, 4]
    assert len(other.asked) == 1


@pytest.mark.parametrize(
    "answer",
    [["it finds too little memory (OutOfMemoryError: CUDA out of memory.)"], MemoryError("std::bad_alloc")],
)
def test_it_is_asked_again_where_memory_was_short(tiny: Any, answer: Any) -> None:
    op = Compiled(answer)
    assert chosen(tiny, {"mine": op})["latent_attention"].name == "reference"
    op.answer = []
    for _ in range(2):
        assert chosen(tiny, {"mine": op})["latent_attention"].name == "mine"
    assert len(op.asked) == 2


def test_only_an_op_that_would_be_chosen_is_asked(tiny: Any) -> None:
    """A minute of compiling for an op that does not run is a minute lost."""
    first, refusing, second = Compiled(), Compiled(odd_heads=False), Compiled()
    chosen(tiny, {"refusing": refusing, "first": first, "second": second})
    assert (len(refusing.asked), len(first.asked), len(second.asked)) == (0, 1, 0)
    chosen(tiny, {"second": second}, "reference")
    assert second.asked == []


def test_what_is_compiled_is_said_before_and_once(tiny: Any) -> None:
    said: list[tuple[str, int]] = []
    op = Compiled()
    for _ in range(2):
        chosen(tiny, {"mine": op}, say=lambda line: said.append((line, len(op.asked))))
    assert said == [("preparing mine: it compiles", 0)]


def test_an_op_that_compiles_nothing_says_nothing(tiny: Any) -> None:
    quiet = Compiled()
    quiet.compiles = ""
    chosen(tiny, {"mine": quiet, "plain": LatentOp()}, say=lambda line: pytest.fail(line))
    assert len(quiet.asked) == 1


# ----------------------------------------------------------------------------------- test overrides
# Ops of single roles that come before the policy, and the weights that layers with other ops share.

OFFERED = {
    "first": FaultyOp("latent_attention", "none"),
    "second": FaultyOp("latent_attention", "none"),
    "rows": FaultyOp("linear", "none"),
    "fused": FaultyOp("linear", "none"),  # named like a policy
}


class Refusing(FaultyOp):
    def unsupported_reasons(self, spec: object) -> list[str]:
        return ["it is closed"]


def names_chosen(
    config: MLAConfig, overrides: Mapping[str, str], policy: str = "auto", **more: FusedOp
) -> dict[str, str]:
    offered = {**OFFERED, **more}
    return Ops(config, offered, torch.float32, torch.device("cpu"), policy, overrides).names()


@pytest.mark.parametrize("policy", ["auto", "reference", "fused", "first", "second,rows"])
@pytest.mark.parametrize(
    "overrides",
    [
        {"latent_attention": "second"},
        {"latent_attention": "first", "o_proj": "reference"},
        {"o_proj": "fused", "kv_b_proj": "rows"},
        {"write_latent": "reference"},
    ],
)
def test_an_override_changes_its_role_alone(
    tiny: Callable[..., MLAConfig], policy: str, overrides: dict[str, str]
) -> None:
    assert names_chosen(tiny(), overrides, policy) == {**names_chosen(tiny(), {}, policy), **overrides}


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"latent_atention": "first"}, "has an unknown role 'latent_atention'. Did you mean 'lat"),
        ({"latent_attention": "frist"}, "role latent_attention 'frist'. Did you mean 'first'? It"),
        ({"latent_attention": "rows"}, "unknown op of role latent_attention 'rows'. It takes: reference"),
        ({"rotate_query": "auto"}, "unknown op of role rotate_query 'auto'. It takes: reference."),
    ],
)
def test_a_name_that_does_not_fit_gets_a_sentence(
    tiny: Callable[..., MLAConfig], overrides: dict[str, str], sentence: str
) -> None:
    with pytest.raises(UnknownOp) as error:
        names_chosen(tiny(), overrides)
    assert sentence in str(error.value)


def test_an_op_that_refuses_is_an_error_even_if_another_would_serve(tiny: Callable[..., MLAConfig]) -> None:
    closed = Refusing("latent_attention", "none")
    with pytest.raises(UnsupportedOps) as error:
        names_chosen(tiny(), {"latent_attention": "closed"}, closed=closed)
    assert str(error.value) == (
        "no fused latent_attention serves this layer, but latent_attention=closed requires one: "
        "fused op 'closed' not used because it is closed."
    )


# ------------------------------------------------------------------------------------- shared weights
class Rows(FaultyOp):
    """A linear op that keeps a copy of its weight, as one with a layout of its own does."""

    def __init__(self) -> None:
        super().__init__("linear", "none")
        self.packs = 0

    def pack(self, weight: torch.Tensor):  # type: ignore[no-untyped-def]
        self.packs += 1
        return REFERENCE["linear"].pack(weight.clone())


@pytest.mark.parametrize("lora", [None, 24])
def test_layers_share_what_they_pack_alike_and_nothing_else(
    tiny: Callable[..., MLAConfig], lora: int | None
) -> None:
    config, rows = tiny(q_lora_rank=lora), Rows()
    backend, shared = HostBackend(ops={"rows": rows}), WeakValueDictionary()
    state = random_state_dict(config, 0, torch.float32)
    layers = []
    for overrides in ({}, {"o_proj": "reference"}, {}):
        layer = MLA(config, backend=backend, dtype=torch.float32, overrides=overrides)
        layer.share_weights(shared)
        layer.load_state_dict(state)
        layers.append(layer)
    packed = [layer._weights.packed for layer in layers]
    assert all(packed[0][role] is packed[2][role] for role in packed[0])
    differing = [role for role in packed[0] if packed[0][role] is not packed[1][role]]
    assert differing == ["o_proj"]
    assert rows.packs == (3 if lora is None else 4)
    for layer in layers:
        assert all(torch.equal(layer.state_dict()[name], weight) for name, weight in state.items())


def test_shared_weights_live_as_long_as_a_layer_that_uses_them(tiny: Callable[..., MLAConfig]) -> None:
    shared: WeakValueDictionary[object, object] = WeakValueDictionary()
    layer = MLA(tiny(), dtype=torch.float32)
    layer.share_weights(shared)  # type: ignore[arg-type]
    layer.load_state_dict(random_state_dict(tiny(), 0, torch.float32))
    assert len(shared) == 5
    layer.load_state_dict(random_state_dict(tiny(), 0, torch.float32))
    assert len(shared) == 5
    del layer
    assert not shared
