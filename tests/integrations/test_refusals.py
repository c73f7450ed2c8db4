"""What cannot be served is said in one sentence, before anything is changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import make_model
from torch import nn

from mla.integrations.transformers import UnsupportedModel, restore, use_mla
from mla.layer.core import AttentionCore
from mla_backends import BackendError


def without_mla() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=9, **sizes))


def quantized() -> Any:
    model = make_model("deepseek_v3")

    class Linear8bit(nn.Linear):
        pass

    model.model.layers[1].self_attn.kv_b_proj.__class__ = Linear8bit
    return model


def split() -> Any:
    model = make_model("deepseek_v3")
    model.model.layers[1].self_attn.to("meta")
    return model


def mixed() -> Any:
    model = make_model("deepseek_v3")
    model.model.layers[1].self_attn.to(torch.bfloat16)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (without_mla, "LlamaForCausalLM has no multi-head latent attention"),
        (lambda: nn.Linear(2, 2), "Linear is no loaded model of `transformers`"),
        (quantized, "kv_b_proj of this model is a Linear8bit"),
        (split, "split over devices"),
        (mixed, "differ in dtype"),
        (lambda: use_mla(make_model("deepseek_v3")), "runs our ops already"),
    ],
)
def test_models_that_cannot_be_served(make: Callable[[], Any], message: str) -> None:
    model = make()
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(UnsupportedModel, match=message) as found:
        use_mla(model)
    assert "\n" not in str(found.value)
    assert [(name, type(module)) for name, module in model.named_modules()] == before


def test_a_backend_that_is_not_there_changes_nothing(model: Any) -> None:
    before = [type(module) for module in model.modules()]
    with pytest.raises(BackendError):
        use_mla(model, backend="none.such:backend")
    assert [type(module) for module in model.modules()] == before


def test_an_op_that_fails_halfway_leaves_the_model_as_it_was(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    pack, packed = AttentionCore.load, list[object]()

    def fail_at_the_second(core: AttentionCore, weight: torch.Tensor) -> None:
        packed.append(core)
        if len(packed) == 2:
            raise BackendError("no memory is left.")
        pack(core, weight)

    monkeypatch.setattr(AttentionCore, "load", fail_at_the_second)
    with pytest.raises(BackendError, match="no memory"):
        use_mla(model)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert not any(hasattr(module, "mla_attention") for module in model.modules())
    assert model.config._attn_implementation == "sdpa"


def test_a_model_elsewhere_than_the_backend(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    other = SimpleNamespace(device=torch.device("cuda"), ops=dict)
    monkeypatch.setattr("mla.load_backend", lambda *_, **__: other)
    with pytest.raises(UnsupportedModel, match="this model is on cpu, and backend 'far' computes on cuda"):
        use_mla(model, "far")


PROJECTIONS = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_projection_that_is_more_than_its_weight(model: Any, name: str) -> None:
    """Its scales, its adapter or its hook would be lost."""
    attention = model.model.layers[1].self_attn

    def refused(message: str) -> None:
        with pytest.raises(UnsupportedModel, match=f"{name} of this model is a {message}"):
            use_mla(model)

    hook = getattr(attention, name).register_forward_hook(lambda *_: None)
    refused("Linear of torch.float32")
    hook.remove()
    getattr(attention, name).to(torch.float8_e4m3fn)
    refused("Linear of torch.float8_e4m3fn")
    setattr(attention, name, nn.Sequential(getattr(attention, name)))
    refused("Sequential of no single dtype")


@pytest.mark.parametrize("move", [lambda model: model.to(torch.bfloat16), lambda model: model.half()])
def test_a_model_in_use_is_not_cast(model: Any, move: Callable[[Any], None]) -> None:
    """Its norms would be, and its packed weights would not."""
    use_mla(model)
    with pytest.raises(UnsupportedModel, match="cannot be moved or cast"):
        move(model)


def test_a_model_in_use_is_not_copied(model: Any) -> None:
    use_mla(model)
    with pytest.raises(UnsupportedModel, match="cannot be copied"):
        copy.deepcopy(model)


def test_a_name_is_no_model() -> None:
    with pytest.raises(UnsupportedModel, match="str is no loaded model"):
        use_mla("path/to/model")


def test_inputs_of_another_dtype_are_refused(model: Any) -> None:
    use_mla(model)
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(UnsupportedModel, match="autocast"),
    ):
        model.model.layers[0].self_attn.o_proj(torch.zeros(1, 64, dtype=torch.bfloat16))


def test_there_must_be_something_to_restore(model: Any) -> None:
    with pytest.raises(UnsupportedModel, match="nothing to restore"):
        restore(model)


def own_mask(model: Any) -> None:
    model(input_ids=torch.tensor([[3, 4]]), attention_mask=torch.zeros(1, 1, 2, 2))


def own_whole_numbers(model: Any) -> None:
    mask = torch.ones(2, 2, dtype=torch.int32).tril()[None, None]
    model(input_ids=torch.tensor([[3, 4]]), attention_mask=mask)


def packed(model: Any) -> None:
    model(input_ids=torch.tensor([[3, 4, 5, 6]]), position_ids=torch.tensor([[0, 1, 0, 1]]), use_cache=False)


def training(model: Any) -> None:
    model.train()(input_ids=torch.tensor([[3, 4]]))


def gradients(model: Any) -> None:
    with torch.enable_grad():
        model(input_ids=torch.tensor([[3, 4]]))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (own_mask, "takes no mask of one's own"),
        (own_whole_numbers, "takes no mask of one's own"),
        (packed, "not plain causal attention"),
        (training, "serves inference"),
        (gradients, "serves inference"),
    ],
)
def test_steps_that_cannot_be_served(model: Any, run: Callable[[Any], None], message: str) -> None:
    use_mla(model)
    with torch.no_grad(), pytest.raises(UnsupportedModel, match=message):
        run(model)
