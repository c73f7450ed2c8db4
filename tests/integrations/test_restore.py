"""`restore` leaves nothing behind, and a model in use keeps its state dict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_tokens import Prompts, generate
from tiny_models import make_model
from torch import nn

from mla.integrations.transformers import UnsupportedModel, restore, use_mla
from mla.integrations.transformers.model import Packed, PackedKvB, PackedLinear

TABLES = vars(nn.Module())  # of parameters and modules
ABSORBED = ("kv_b_proj", "w_uk", "w_uv")  # the roles that kv_b_proj is packed for


def snapshot(model: Any) -> list[tuple[str, type, dict[str, Any]]]:
    """Return what there is of every module, and of every parameter besides its numbers."""
    modules = [
        (name, type(module), {key: value for key, value in vars(module).items() if key not in TABLES})
        for name, module in model.named_modules()
    ]
    return modules + [
        (name, type(parameter), dict(vars(parameter))) for name, parameter in model.named_parameters()
    ]


def bits(weights: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    """Return what compares equal where NaN is NaN, and -0 is not 0."""
    return {name: weight.view(torch.int16).tolist() for name, weight in weights.items()}


@pytest.mark.parametrize("family", ["deepseek_v3 with biases", "longcat_flash"])
def test_weights_that_kernels_packed_come_back_bit_for_bit(family: str, native: str) -> None:
    """They serve bfloat16, and lay weights out in their own way."""
    model = make_model(family, torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            finite = "kv_b_proj" in name  # as a layer's weights must be
            odd = torch.tensor(
                [-0.0, -1e-40, 3e38, 1e-40] if finite else [-0.0, torch.nan, -torch.inf, 1e-40]
            )
            if "_proj" in name:
                weight.view(-1)[:4] = odd
                weight.view(-1)[-4:] = odd
    before = bits(model.state_dict())
    use_mla(model, options={"native": native})
    packed = [module for module in model.modules() if isinstance(module, Packed)]
    names = {module._choice.name for module in packed if isinstance(module, PackedLinear)}
    cores = {
        module._core.ops[role].name for module in packed if isinstance(module, PackedKvB) for role in ABSORBED
    }
    assert "reference" not in names | cores
    assert bits(model.state_dict()) == before
    assert bits(restore(model).state_dict()) == before


@pytest.mark.parametrize("family", ["deepseek_v3 with biases", "longcat_flash", "kimi_linear"])
def test_nothing_is_left(family: str) -> None:
    model = make_model(family)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    trains = {name: weight.requires_grad for name, weight in model.named_parameters()}
    model.get_parameter(next(name for name in weights if "kv_a_proj" in name)).mark = "of others"
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

    def switches() -> list[tuple[bool, list[bool]]]:
        return [
            (module.training, [parameter.requires_grad for parameter in module.parameters()])
            for module in model.modules()
        ]

    before = switches()
    restore(use_mla(model))
    assert switches() == before


def test_no_plain_weight_stays_beside_a_packed_one() -> None:
    model = use_mla(make_model("deepseek_v3"))
    attention = model.model.layers[0].self_attn
    assert not [name for name, module in attention.named_modules() if isinstance(module, nn.Linear)]
    assert {name for name, weight in attention.named_parameters() if weight.numel()} == {
        "q_a_layernorm.weight",
        "kv_a_layernorm.weight",
    }


def test_weights_are_loaded_into_plain_models_alone(model: Any) -> None:
    state = {name: weight + 1 for name, weight in model.state_dict().items()}
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    use_mla(model)
    with pytest.raises(UnsupportedModel, match="restore"):
        model.load_state_dict(state)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    restore(model).load_state_dict(state)
    use_mla(model)
    assert all(torch.equal(weight, state[name]) for name, weight in restore(model).state_dict().items())


@pytest.mark.parametrize(("prepared", "given"), [("", ""), ("model", "model"), ("model", "")])
def test_what_was_prepared_is_restored_alone_or_in_a_whole(
    model: Any, prompts: Prompts, prepared: str, given: str
) -> None:
    theirs, before = generate(model, prompts, max_new_tokens=8), snapshot(model)
    use_mla(model.get_submodule(prepared))
    assert torch.equal(generate(model, prompts, max_new_tokens=8), theirs)
    for other in (model.lm_head, model.model.layers[1]):
        with pytest.raises(UnsupportedModel, match="nothing to restore"):
            restore(other)
    restore(model.get_submodule(given))
    assert snapshot(model) == before
    with pytest.raises(UnsupportedModel, match="nothing to restore"):
        restore(model)


def test_all_models_that_something_holds_are_restored() -> None:
    both = torch.nn.ModuleList(use_mla(make_model("deepseek_v3")) for _ in range(2))
    restore(both)
    for model in both:
        with pytest.raises(UnsupportedModel, match="nothing to restore"):
            restore(model)


def test_a_move_of_the_models_own_is_kept(model: Any) -> None:
    """A method that its user gave it is called while it is in use, and is there afterwards."""
    moved: list[object] = []
    model._apply = lambda change, *arguments: moved.append(change) or type(model)._apply(model, change)
    own = model._apply
    use_mla(model).to("cpu")
    with pytest.raises(UnsupportedModel, match="cannot be moved or cast"):
        model.half()
    assert len(moved) == 2
    assert vars(restore(model))["_apply"] is own


def test_it_is_saved_as_it_was_loaded(model: Any, tmp_path: Path) -> None:
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    use_mla(model).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    assert all(torch.equal(weight, state[name]) for name, weight in loaded.state_dict().items())
