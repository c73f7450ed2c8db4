"""Ops of single roles that come before the policy, and the weights that layers with other ops share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from weakref import WeakValueDictionary

import pytest
import torch
from faulty_backend import FaultyOp

from mla import MLA, MLAConfig
from mla.errors import UnknownOp, UnsupportedOps
from mla.layer.ops import Ops
from mla.reference import REFERENCE
from mla.weights import random_state_dict
from mla_backends.api import FusedOp
from mla_backends.testing import HostBackend

OFFERED = {
    "first": FaultyOp("latent_attention", "none"),
    "second": FaultyOp("latent_attention", "none"),
    "rows": FaultyOp("linear", "none"),
    "fused": FaultyOp("linear", "none"),  # named like a policy
}


class Refusing(FaultyOp):
    def unsupported_reasons(self, spec: object) -> list[str]:
        return ["it is closed"]


def choose(
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
    assert choose(tiny(), overrides, policy) == {**choose(tiny(), {}, policy), **overrides}


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"latent_atention": "first"}, "has no role 'latent_atention'. Did you mean 'latent_attention'?"),
        (
            {"latent_attention": "frist"},
            "this backend offers no op 'frist'. Did you mean 'first'? "
            "latent_attention takes: reference, first, second.",
        ),
        (
            {"latent_attention": "rows"},
            "op 'rows' is of kind linear. latent_attention takes: reference, first, second.",
        ),
        ({"rotate_query": "auto"}, "offers no op 'auto'. rotate_query takes: reference."),
    ],
)
def test_a_name_that_does_not_fit_gets_a_sentence(
    tiny: Callable[..., MLAConfig], overrides: dict[str, str], sentence: str
) -> None:
    with pytest.raises(UnknownOp) as error:
        choose(tiny(), overrides)
    assert sentence in str(error.value)


def test_an_op_that_refuses_is_an_error_even_if_another_would_serve(tiny: Callable[..., MLAConfig]) -> None:
    closed = Refusing("latent_attention", "none")
    with pytest.raises(UnsupportedOps) as error:
        choose(tiny(), {"latent_attention": "closed"}, closed=closed)
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


def test_a_layer_that_shares_nothing_loads_what_it_is_given(tiny: Callable[..., MLAConfig]) -> None:
    layer = MLA(tiny(), dtype=torch.float32)
    for seed in (0, 1):
        state = random_state_dict(tiny(), seed, torch.float32)
        layer.load_state_dict(state)
        assert all(torch.equal(layer.state_dict()[name], weight) for name, weight in state.items())
