"""What cannot be served is said in one sentence, before anything is changed."""

from __future__ import annotations

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
        (lambda: nn.Linear(2, 2), "Linear is no model of `transformers`"),
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


def fp8() -> Any:
    model = make_model("deepseek_v3")
    model.model.layers[1].self_attn.kv_b_proj.to(torch.float8_e4m3fn)
    return model


def test_fp8_weights(model: Any) -> None:
    with pytest.raises(UnsupportedModel, match="float8_e4m3fn"):
        use_mla(fp8())


def test_there_must_be_something_to_restore(model: Any) -> None:
    with pytest.raises(UnsupportedModel, match="nothing to restore"):
        restore(model)


def own_mask(model: Any) -> None:
    model(input_ids=torch.tensor([[3, 4]]), attention_mask=torch.zeros(1, 1, 2, 2))


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
        (packed, "not plain causal attention"),
        (training, "serves inference"),
        (gradients, "serves inference"),
    ],
)
def test_steps_that_cannot_be_served(model: Any, run: Callable[[Any], None], message: str) -> None:
    use_mla(model)
    with torch.no_grad(), pytest.raises(UnsupportedModel, match=message):
        run(model)
