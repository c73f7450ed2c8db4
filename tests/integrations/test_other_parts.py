"""Parts that others add to a model: caches that quantize, and adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_tokens import Prompts, both, generate
from tiny_models import CACHE, PLAIN, fill
from torch import nn
from transformers.cache_utils import Cache, QuantizedLayer

from mla.integrations.transformers import PagedCache, UnsupportedModel, restore, use_mla


class HalfLayer(QuantizedLayer):
    """Keeps all but the last tokens in float16; what packages of quantizers fill in is this much."""

    def __init__(self) -> None:
        super().__init__(residual_length=5)

    def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        return tensor.half()

    def _dequantize(self, q_tensor: torch.Tensor) -> torch.Tensor:
        return q_tensor.float()


@pytest.mark.parametrize("words", [{}, {"num_beams": 2}], ids=str)
def test_a_quantized_cache(model: Any, prompts: Prompts, words: dict[str, Any]) -> None:
    outputs = []
    for prepare in (lambda model: model, use_mla):
        cache = Cache(layers=[HalfLayer() for _ in range(2)])
        outputs.append(generate(prepare(model), prompts, **{CACHE: cache}, **words))
        assert cache.layers[1]._quantized_keys.shape[2] > 60
    assert torch.equal(*outputs)


class Adapter(nn.Module):
    """A projection with a low-rank one beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = self.base(x) + self.up(self.down(x))
        return added


def test_adapters_of_other_projections_are_served(model: Any, prompts: Prompts) -> None:
    plain = generate(model, prompts)
    model.model.layers[0].mlp.down_proj = Adapter(model.model.layers[0].mlp.down_proj)
    theirs, ours = both(model, prompts)
    assert torch.equal(theirs, ours)
    assert not torch.equal(plain, ours), "the adapter changes nothing"


@pytest.mark.parametrize("name", ["q_a_proj", "kv_b_proj", "o_proj"])
def test_adapters_of_attention_are_refused(model: Any, name: str) -> None:
    layer = model.model.layers[1].self_attn
    setattr(layer, name, Adapter(getattr(layer, name)))
    with pytest.raises(UnsupportedModel, match=f"{name} of this model is .*Adapter: .* without adapters"):
        use_mla(model)


# -------------------------------------------------------------------------------------- test images
# A model that sees attends images as it did, and what it says through our ops.

IMAGE = 95  # the token that stands for a patch


def make_seeing_model() -> Any:
    from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration

    vision = {"num_attention_heads": 2, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}
    rest = {"projection_hidden_size": 32, "image_token_id": IMAGE, "tie_word_embeddings": False}
    text = {**PLAIN, "model_type": "deepseek_v3"}
    torch.manual_seed(0)
    return fill(
        Kimi_K25ForConditionalGeneration(Kimi_K25Config(text_config=text, vision_config=vision, **rest))
    )


def test_a_model_that_sees_says_the_same() -> None:
    model = make_seeing_model()
    ids = torch.tensor([[3, 4, *[IMAGE] * 4, 5, 6, 7]])
    pixels = torch.randn(16, 3, 14, 14, generator=torch.Generator().manual_seed(2))
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    prompt["image_grid_thw"] = torch.tensor([[1, 4, 4]])
    theirs = generate(model, prompt, max_new_tokens=20)
    assert not torch.equal(generate(model, {**prompt, "pixel_values": -pixels}, max_new_tokens=20), theirs)
    use_mla(model)
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert torch.equal(generate(model, prompt, max_new_tokens=20), theirs)
    cache = {CACHE: PagedCache(model, max_tokens=256)}
    assert torch.equal(generate(model, prompt, max_new_tokens=20, **cache), theirs)
    restore(model)
    assert model.config.text_config._attn_implementation == "sdpa"
