"""Weights in and out of the layer, and every refusal of the layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from mla import MLA
from mla.errors import WeightError
from mla.reference import REFERENCE
from mla.weights import random_state_dict, weight_shapes
from mla_backends import FusedOp
from mla_backends.api import OPS, Packed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [None, 24])
@pytest.mark.parametrize("bias", [False, True])
def test_state_dict_is_a_round_trip_bit_for_bit(
    tiny: Any, dtype: torch.dtype, rank: int | None, bias: bool
) -> None:
    config = tiny(q_lora_rank=rank, attention_bias=bias)
    state = random_state_dict(config, dtype=dtype)
    layer = MLA(config, dtype=dtype)
    layer.load_state_dict(state)
    loaded = layer.state_dict()
    assert list(loaded) == list(weight_shapes(config))
    for name, weight in state.items():
        assert loaded[name].dtype == dtype
        assert torch.equal(loaded[name], weight), name
    again = MLA(config, dtype=dtype)
    again.load_state_dict(loaded)
    assert all(torch.equal(weight, state[name]) for name, weight in again.state_dict().items())


def test_loaded_weights_are_copies(make_case: Any) -> None:
    case = make_case([3], [4])
    before = case.run()
    for weight in (*case.state.values(), *case.layer.state_dict().values()):
        weight.zero_()
    assert torch.equal(case.run(), before)


def test_loading_again_replaces_every_weight(make_case: Any) -> None:
    case = make_case([40, 2], [10, 60])
    case.run()
    case.state = random_state_dict(case.config, 7, torch.float32)
    case.layer.load_state_dict(case.state)
    assert (case.run() - case.truth()).norm() <= 1e-5 * case.truth().norm()


def broken(state: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    weight = state["o_proj.weight"]
    changes: dict[str, dict[str, Any]] = {
        "missing": {},
        "transposed": {"o_proj.weight": state["o_proj.weight"].T},
        "one row short": {"kv_b_proj.weight": state["kv_b_proj.weight"][1:]},
        "unknown": {"q_b_proj.weight": torch.zeros(1)},
        "nan": {"o_proj.weight": torch.nan * weight},
        "infinite": {"o_proj.weight": weight / 0},
        "too large": {"o_proj.weight": torch.full_like(weight, 1e39, dtype=torch.float64)},
        "integers": {"o_proj.weight": weight.long()},
        "complex": {"o_proj.weight": weight.cfloat()},
        "bool": {"o_proj.weight": weight > 0},
        "sparse": {"o_proj.weight": weight.to_sparse()},
        "on meta": {"o_proj.weight": weight.to("meta")},
        "a list": {"o_proj.weight": weight.tolist()},
    }
    kept = {name: weight for name, weight in state.items() if how != "missing" or "layernorm" not in name}
    return {**kept, **changes[how]}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"weight 'kv_a_layernorm.weight' is missing"),
        ("transposed", r"weight 'o_proj.weight' has shape \[36, 48\], expected \[48, 36\]"),
        ("one row short", r"weight 'kv_b_proj.weight' has shape \[83, 32\], expected \[84, 32\]"),
        ("unknown", r"weight 'q_b_proj.weight' does not belong to this layer \(1 unknown"),
        ("nan", r"weight 'o_proj.weight' holds NaN or infinity"),
        ("infinite", r"weight 'o_proj.weight' holds NaN or infinity"),
        ("too large", r"weight 'o_proj.weight' holds NaN or infinity, or does in torch.float32"),
        ("integers", r"weight 'o_proj.weight' is torch.int64 .*, expected a dense tensor of floating-point"),
        ("complex", r"weight 'o_proj.weight' is torch.complex64"),
        ("bool", r"weight 'o_proj.weight' is torch.bool"),
        ("sparse", r"weight 'o_proj.weight' is torch.float32 \(torch.sparse_coo\)"),
        ("on meta", r"weight 'o_proj.weight' is a meta tensor"),
        ("a list", r"weight 'o_proj.weight' is a list"),
    ],
)
def test_a_wrong_state_dict_is_refused_by_name_and_the_layer_keeps_what_it_had(
    tiny: Any, how: str, message: str
) -> None:
    layer, state = MLA(tiny(), dtype=torch.float32), random_state_dict(tiny(), dtype=torch.float32)
    with pytest.raises(WeightError, match=message):
        layer.load_state_dict(broken(state, how))
    with pytest.raises(WeightError, match="no weights yet"):
        layer.state_dict()
    layer.load_state_dict(state)
    other = random_state_dict(tiny(), 1, torch.float32)
    with pytest.raises(WeightError, match=message):
        layer.load_state_dict(broken(other, how))
    assert all(torch.equal(weight, state[name]) for name, weight in layer.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float64])
def test_weights_of_any_float_dtype_are_taken(tiny: Any, dtype: torch.dtype) -> None:
    state = {name: weight.to(dtype) for name, weight in random_state_dict(tiny()).items()}
    layer = MLA(tiny())
    layer.load_state_dict(state)
    assert all(torch.equal(x, state[name].bfloat16()) for name, x in layer.state_dict().items())


def test_unknown_weights_pass_when_not_strict(tiny: Any) -> None:
    layer, state = MLA(tiny(), dtype=torch.float32), random_state_dict(tiny(), dtype=torch.float32)
    layer.load_state_dict({**state, "rotary_emb.inv_freq": torch.zeros(4)}, strict=False)
    assert set(layer.state_dict()) == set(state)


def test_a_layer_without_weights_says_so(make_case: Any, tiny: Any) -> None:
    case = make_case([1], [4])
    with pytest.raises(WeightError, match=r"no weights yet: call load_state_dict\(\) first"):
        MLA(tiny(), dtype=torch.float32)(case.hidden, case.batch, case.cache.pages[0])


@pytest.mark.parametrize(
    "move", [lambda layer: layer.to(torch.float16), lambda layer: layer.cpu(), lambda layer: layer.half()]
)
def test_a_layer_cannot_be_moved_or_cast(make_case: Any, move: Any) -> None:
    case = make_case([1], [4])
    with pytest.raises(RuntimeError, match=r"cannot be moved or cast: its weights are packed"):
        move(case.layer)


def test_forward_needs_no_gradient_and_builds_no_graph(make_case: Any) -> None:
    case = make_case([2], [4])
    case.hidden.requires_grad_()
    assert not case.run().requires_grad


@pytest.mark.parametrize("rank", [None, 24])
def test_reference_weights_are_kept_once_and_kv_b_for_both_its_uses(tiny: Any, rank: int | None) -> None:
    config = tiny(q_lora_rank=rank)
    layer = MLA(config, dtype=torch.bfloat16)
    layer.load_state_dict(random_state_dict(config))
    matrices = [shape for shape in weight_shapes(config).values() if len(shape) == 2]
    kv_b = math.prod(weight_shapes(config)["kv_b_proj.weight"])
    assert layer.weight_bytes() == 2 * (sum(rows * columns for rows, columns in matrices) + kv_b)


@dataclass
class Transposed:
    """A layout of a backend's own, which is no tensor."""

    columns: torch.Tensor


class TransposingLinear(FusedOp):
    contract = OPS["linear"]

    def pack(self, weight: torch.Tensor) -> Packed:
        data = Transposed(weight.T.contiguous())
        return Packed(data, data.columns.numel() * data.columns.element_size())

    def unpack(self, packed: Packed) -> torch.Tensor:
        return packed.data.columns.T

    def __call__(self, packed: Packed, *, x: torch.Tensor, bias: Any, out: torch.Tensor) -> None:
        REFERENCE["linear"](Packed(packed.data.columns.T, 0), x=x, bias=bias, out=out)


def test_a_backends_own_layout_computes_and_unpacks(make_case: Any, tiny: Any) -> None:
    config = tiny(q_lora_rank=24, attention_bias=True)
    case = make_case([40, 2], [10, 60], config, ops={"transposing": TransposingLinear()})
    assert (case.run() - case.truth()).norm() <= 1e-5 * case.truth().norm()
    for name, weight in case.layer.state_dict().items():
        assert torch.equal(weight, case.state[name]), name
    plain = MLA(config, dtype=torch.float32)
    plain.load_state_dict(case.state)
    assert case.layer.weight_bytes() == plain.weight_bytes()


def test_the_pages_of_another_cache_are_refused(make_case: Any) -> None:
    case = make_case([2, 1], [4, 5])
    with pytest.raises(ValueError, match="are not of the cache this batch describes"):
        case.layer(case.hidden, case.batch, case.cache.pages[0][:-1])


def test_the_layer_keeps_its_weights_inside_a_larger_module(tiny: Any) -> None:
    config = tiny(q_lora_rank=24)
    state = random_state_dict(config)
    layer = MLA(config)
    layer.load_state_dict(state)
    whole = torch.nn.ModuleDict({"self_attn": layer, "mlp": torch.nn.Linear(2, 2)})
    saved = whole.state_dict()
    assert {name for name in saved if name.startswith("self_attn.")} == {
        f"self_attn.{name}" for name in state
    }
    other = torch.nn.ModuleDict({"self_attn": MLA(config), "mlp": torch.nn.Linear(2, 2)})
    other.load_state_dict(saved)
    assert all(torch.equal(weight, state[name]) for name, weight in other["self_attn"].state_dict().items())
