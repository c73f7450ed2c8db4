"""A forward that cannot be served is refused before a layer runs: caches go on as if it had not been."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import CACHE, make_model
from transformers import StaticCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import causal_mask_function

from mla.integrations.transformers import UnsupportedModel, use_mla
from mla.integrations.transformers.admission import visible_keys

PROMPT, TOKEN = torch.arange(3, 9)[None], torch.tensor([[7]])


def trains(model: Any, *names: str) -> list[torch.nn.Parameter]:
    """Freeze all weights but these, and return these."""
    model.requires_grad_(False)
    weights = [model.get_parameter(name) for name in names]
    for weight in weights:
        weight.requires_grad = True
    return weights


def forward(model: Any, **words: Any) -> Any:
    return model(input_ids=TOKEN, **words)


def causal(queries: int, before: int, requests: int = 1) -> torch.Tensor:
    return visible_keys(requests, queries, queries + before, before, mask_function=causal_mask_function)


def training(model: Any, **words: Any) -> None:
    model.model.layers[1].self_attn.train()
    try:
        forward(model, **words)
    finally:
        model.eval()


def autocast(model: Any, **words: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        forward(model, **words)


def gradients_of_a_later_layer(model: Any, **words: Any) -> None:
    trains(model, "model.layers.1.input_layernorm.weight")
    with torch.enable_grad():
        forward(model, **words)


def gradients_of_inputs(model: Any, **words: Any) -> None:
    inputs = model.get_input_embeddings()(TOKEN).detach().requires_grad_()
    with torch.enable_grad():
        model(inputs_embeds=inputs, **words)


def all_keys(model: Any, **words: Any) -> None:
    layer = next(module for module in reversed(list(model.modules())) if hasattr(module, "mla_attention"))
    layer.is_causal = False
    try:
        forward(model, **words)
    finally:
        layer.is_causal = True


def another_attention(model: Any, **words: Any) -> None:
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        forward(model, **words)
    finally:
        model.set_attn_implementation(before)


def masked(mask: torch.Tensor) -> Callable[..., Any]:
    return lambda model, **words: forward(model, **words, attention_mask=mask)


OTHER = r"takes no mask \[batch, 1"
REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "attention weights": (lambda *a, **k: forward(*a, **k, output_attentions=True), "no attention weights"),
    "mask": (masked(torch.zeros(1, 1, 1, 7)), OTHER),
    "whole numbers": (masked(torch.zeros(1, 1, 1, 7, dtype=torch.int32)), OTHER),
    "mask by place": (lambda model, **words: model.model(TOKEN, torch.zeros(1, 1, 1, 7), **words), OTHER),
    "a mask of ours for other queries": (masked(causal(2, 5)), OTHER),
    "a mask of ours for other tokens": (masked(causal(1, 0)), OTHER),
    "a mask of ours for other requests": (masked(causal(1, 6, requests=2)), OTHER),
    "a mask of other requests": (
        masked(torch.ones(2, 7, dtype=torch.int64)),
        r"shape \[2, 7\] for 7 tokens so far of 1 requests",
    ),
    "all keys at once": (all_keys, "is_causal = False"),
    "training": (training, "serves inference"),
    "gradients of a later layer": (gradients_of_a_later_layer, "serves inference"),
    "gradients of inputs": (gradients_of_inputs, "serves inference"),
    "autocast": (autocast, "leave autocast out"),
    "another attention": (another_attention, "sdpa attention was selected"),
}


@pytest.mark.parametrize("family", ["deepseek_v3", "kimi_linear"])
@pytest.mark.parametrize("refused", REFUSED)
def test_a_cache_goes_on_after_a_refusal(family: str, refused: str) -> None:
    """A static one would take the token twice, and a linear layer's state too."""
    model = make_model(family).requires_grad_(False)
    use_mla(model)
    run, message = REFUSED[refused]
    logits = []
    for attempts in (0, 1):
        cache = {CACHE: StaticCache(config=model.config, max_cache_len=16)}
        with torch.no_grad():
            model(input_ids=PROMPT, **cache)
            for _ in range(attempts):
                with pytest.raises(UnsupportedModel, match=message) as raised:
                    run(model, **cache)
                assert "\n" not in str(raised.value)
            logits.append(model(input_ids=TOKEN, **cache).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    "name",
    [
        "embed_tokens.weight",
        "layers.0.mlp.down_proj.weight",
        *(
            f"layers.1.self_attn.{name}"
            for name in ("kv_a_layernorm.weight", "kv_b_proj.weight", "o_proj.weight", "o_proj.bias")
        ),
    ],
)
def test_no_gradient_is_lost(name: str) -> None:
    """The head would get one, and the other weight none."""
    model = make_model("deepseek_v3 with biases")
    trains(model, "lm_head.weight", f"model.{name}")
    use_mla(model)
    with pytest.raises(UnsupportedModel, match="serves inference"):
        model(input_ids=PROMPT)


def test_a_head_alone_is_trained() -> None:
    grads = []
    for prepare in (lambda model: model, use_mla):
        model = make_model("deepseek_v3")
        (head,) = trains(model, "lm_head.weight")
        prepare(model)(input_ids=PROMPT).logits.sum().backward()
        assert head.grad is not None
        grads.append(head.grad)
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["o_proj", "kv_a_layernorm"])
def test_a_layer_alone_loses_no_gradient(model: Any, name: str) -> None:
    trains(model, f"model.layers.1.self_attn.{name}.weight")
    layer = use_mla(model).model.layers[1].self_attn
    flags = causal(2, 0)
    turn = torch.ones(1, 2, 8), torch.zeros(1, 2, 8)
    with pytest.raises(UnsupportedModel, match="serves inference"):
        layer(torch.zeros(1, 2, 64), position_embeddings=turn, attention_mask=flags)


def test_a_default_device_is_not_ours(model: Any) -> None:
    """`torch.set_default_device` is for what a user makes: tables of the host stay there."""
    mask, positions = torch.tensor([[0, 0, 1, 1, 1, 1]]), torch.arange(6)[None]
    logits = []
    for prepare in (lambda model: model, use_mla):
        prepare(model)
        with torch.no_grad(), torch.device("meta"):
            logits.append(model(PROMPT, attention_mask=mask, position_ids=positions).logits[:, 2:])
    assert torch.allclose(*logits, atol=1e-5)


def test_flags_of_this_step_are_taken(model: Any) -> None:
    """`generate` makes them before the forward where a cache is static; inputs may come in any way."""
    use_mla(model)
    inputs = model.get_input_embeddings()(TOKEN)
    logits = []
    for words in ({"input_ids": TOKEN}, {"input_ids": TOKEN}, {"inputs_embeds": inputs}):
        cache = {CACHE: StaticCache(config=model.config, max_cache_len=16)}
        mask = {"attention_mask": causal(1, 6)} if logits else {}
        with torch.no_grad():
            model(input_ids=PROMPT, **cache)
            logits.append(model(**words, **mask, **cache).logits)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_a_later_layer_that_drops_tokens_is_seen_before_the_first_one_runs(model: Any) -> None:
    use_mla(model)
    layers = [DynamicLayer(), DynamicSlidingWindowLayer(sliding_window=4)]
    cache = Cache(layers=layers)
    with torch.no_grad():
        model(input_ids=PROMPT, **{CACHE: cache})
        with pytest.raises(UnsupportedModel, match="layer 1 of this cache keeps a window"):
            model(input_ids=TOKEN, **{CACHE: cache})
    assert [layer.get_seq_length() for layer in layers] == [6, 6]


def test_a_model_from_the_config_of_one_in_use_says_so(model: Any) -> None:
    use_mla(model)
    other = type(model)(model.config).eval()
    with torch.no_grad(), pytest.raises(UnsupportedModel, match="was copied from a model under `use_mla`"):
        other(input_ids=PROMPT)
    with pytest.raises(UnsupportedModel, match="was copied from a model under `use_mla`"):
        use_mla(other)
