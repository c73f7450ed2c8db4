"""`restore` leaves nothing behind, and a model in use keeps its state dict."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import make_model
from torch import nn

from mla.integrations.transformers import UnsupportedModel, restore, use_mla


def snapshot(model: Any) -> list[tuple[str, type, dict[str, Any]]]:
    """Return what is visible of every module."""
    return [
        (name, type(module), {key: value for key, value in vars(module).items() if not key.startswith("_")})
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("family", ["deepseek_v3 with biases", "longcat_flash", "kimi_linear"])
def test_nothing_is_left(family: str) -> None:
    model = make_model(family)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    trains = {name: weight.requires_grad for name, weight in model.named_parameters()}
    modules, attention = snapshot(model), model.config._attn_implementation
    use_mla(model)
    assert {
        name: torch.equal(weight, weights[name]) for name, weight in model.state_dict().items()
    } == dict.fromkeys(weights, True)
    restore(model)
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == trains
    assert snapshot(model) == modules
    assert model.config._attn_implementation == attention


def test_a_model_that_was_training_goes_on(model: Any) -> None:
    model.train()
    model.model.layers[0].self_attn.q_b_proj.weight.requires_grad = False
    before = [
        (module.training, [one.requires_grad for one in module.parameters()]) for module in model.modules()
    ]
    restore(use_mla(model))
    after = [
        (module.training, [one.requires_grad for one in module.parameters()]) for module in model.modules()
    ]
    assert after == before


def test_no_plain_weight_stays_beside_a_packed_one() -> None:
    model = use_mla(make_model("deepseek_v3"))
    attention = model.model.layers[0].self_attn
    assert not [name for name, module in attention.named_modules() if isinstance(module, nn.Linear)]
    assert {name for name, _ in attention.named_parameters()} == {
        "q_a_layernorm.weight",
        "kv_a_layernorm.weight",
    }


def test_weights_are_loaded_into_plain_models_alone(model: Any) -> None:
    state = model.state_dict()
    use_mla(model)
    with pytest.raises(UnsupportedModel, match="restore"):
        model.load_state_dict(state)
