"""A model that sees attends images as it did, and what it says through our ops."""

from __future__ import annotations

from typing import Any

import torch
from test_tokens import generate
from tiny_models import CACHE, PLAIN, fill

from mla.integrations.transformers import PagedCache, restore, use_mla

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
