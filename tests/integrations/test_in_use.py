"""What a model in use refuses besides forwards: moves and copies."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from test_refusals import PROJECTIONS, assert_same
from test_tokens import generate
from tiny_models import make_model

from mla import load_backend
from mla.integrations.transformers import PagedCache, UnsupportedModel, restore, use_mla

PROMPT = torch.arange(3, 9)[None]


@pytest.mark.parametrize(
    "move",
    [
        lambda part: part.to(torch.bfloat16),
        lambda part: part.half(),
        lambda part: part.double(),
        lambda part: part.to_empty(device="cpu"),
    ],
)
def test_a_model_in_use_is_not_moved(model: Any, move: Callable[[Any], Any]) -> None:
    """Its norms would be, and its packed weights would not."""
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    attention = use_mla(model).model.layers[0].self_attn
    for part in (model, model.model, attention.kv_b_proj, attention.o_proj):
        with pytest.raises(UnsupportedModel, match="cannot be moved or cast"):
            move(part)
    assert_same(model, before)
    assert move(restore(model)) is model


@pytest.mark.parametrize("change", [lambda model: model.to("cpu"), lambda model: model.float()])
def test_a_move_that_changes_nothing_passes(model: Any, change: Callable[[Any], Any]) -> None:
    prompt = {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)}
    theirs = generate(model, prompt, max_new_tokens=4)
    use_mla(model)
    for part in (model, model.model, model.model.layers[0].self_attn):
        assert change(part) is part
    assert torch.equal(generate(model, prompt, max_new_tokens=4), theirs)


def test_a_backend_may_be_given_itself(model: Any) -> None:
    prompt = {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)}
    theirs, opened = generate(model, prompt, max_new_tokens=4), load_backend("cpu")
    with pytest.raises(UnsupportedModel, match=r"this backend is open: give threads to `mla\.load_backend`"):
        use_mla(model, backend=opened, threads=1)
    use_mla(model, backend=opened)
    assert torch.equal(generate(model, prompt, max_new_tokens=4), theirs)


def test_threads_share_a_model_in_use(model: Any) -> None:
    prompts = [{"input_ids": PROMPT + added, "attention_mask": torch.ones_like(PROMPT)} for added in range(3)]
    theirs = [generate(model, prompt, max_new_tokens=8) for prompt in prompts]
    use_mla(model)
    with ThreadPoolExecutor(3) as pool:
        for _ in range(4):
            ours = list(pool.map(lambda prompt: generate(model, prompt, max_new_tokens=8), prompts))
            assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_model_in_use_is_not_copied(model: Any, copied: Callable[[Any], Any]) -> None:
    use_mla(model)
    for part in (model, model.model):
        with pytest.raises(UnsupportedModel, match="cannot be copied or pickled"):
            copied(part)


def test_an_optimizer_made_before_trains_after(model: Any) -> None:
    """It holds the parameters themselves, in use without their memory."""
    weights = dict(model.named_parameters())
    optimizer = torch.optim.SGD(weights.values(), lr=1.0)
    (model(PROMPT, labels=PROMPT).loss).backward()
    grads = {name: weight.grad for name, weight in weights.items()}
    attention = use_mla(model).model.layers[0].self_attn
    assert [attention.get_parameter(f"{name}.weight").numel() for name in PROJECTIONS] == [0] * 5
    before = {name: weight.clone() for name, weight in restore(model).state_dict().items()}
    assert all(weight is weights[name] for name, weight in model.named_parameters())
    assert all(weight.grad is grads[name] for name, weight in model.named_parameters())
    optimizer.zero_grad()
    model.train()(PROMPT, labels=PROMPT).loss.backward()
    optimizer.step()
    assert not [name for name in weights if torch.equal(weights[name], before[name])]


@pytest.mark.parametrize("where", ["use", "restore", "both"])
def test_weights_from_inference_mode_can_be_trained(model: Any, where: str) -> None:
    with torch.inference_mode(where != "restore"):
        use_mla(model)
        model(PROMPT) if where != "restore" else None
    with torch.inference_mode(where != "use"):
        restore(model)
    model.train()(PROMPT, labels=PROMPT).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize("part", ["", "model.layers.1.self_attn", "model.layers.1.self_attn.o_proj"])
def test_weights_are_frozen_and_set_free_while_in_use(part: str) -> None:
    model = make_model("deepseek_v3 with biases").requires_grad_(False)
    frozen = use_mla(model).get_submodule(part)
    frozen.requires_grad_(True)
    with pytest.raises(UnsupportedModel, match="serves inference"):
        model(PROMPT)
    frozen.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    model(PROMPT).logits.sum().backward()
    frozen.requires_grad_(True)
    restore(model)
    assert all(weight.requires_grad for weight in model.get_submodule(part).parameters())


def test_weights_are_not_overwritten_by_name(model: Any) -> None:
    """Of all but the projections they would be, and the model would be a mixture of two."""
    others = {name: weight.clone() for name, weight in model.named_parameters()}
    use_mla(model)
    for name, weight in model.named_parameters():
        if any(projection in name for projection in PROJECTIONS):
            with torch.no_grad(), pytest.raises(RuntimeError, match="size"):
                weight.copy_(others[name])


@pytest.mark.parametrize("end", [lambda model: None, restore], ids=["in use", "restored"])
def test_memory_is_free_when_nobody_has_the_model(end: Callable[[Any], Any]) -> None:
    """Python's collector of cycles counts objects, not bytes: it comes late for a model, and for pages."""
    model = use_mla(make_model("deepseek_v3"))
    cache = PagedCache(model, max_tokens=256)
    model.generate(PROMPT, max_new_tokens=2, **cache.argument)
    pages = weakref.ref(cache.latents.pages)
    gc.disable()
    try:
        del cache
        assert pages() is None
        end(model)
        weights = [weakref.ref(weight) for weight in model.parameters()]
        gone = weakref.ref(model.model.layers[0].self_attn)
        del model
        assert gone() is None
        assert not [weight for weight in weights if weight() is not None]
    finally:
        gc.enable()


def test_a_parameter_that_was_replaced_does_not_stand_in_the_way(model: Any) -> None:
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    use_mla(model).model.layers[0].self_attn.o_proj.weight = torch.nn.Parameter(torch.ones(2))
    assert_same(restore(model), state)


def test_a_bias_in_another_dtype_is_refused() -> None:
    """Kernels would read its bytes as if it were in that of the weights."""
    model = use_mla(make_model("deepseek_v3 with biases"))
    bias = model.model.layers[0].self_attn.o_proj.bias
    bias.data = bias.data.double()
    with torch.no_grad(), pytest.raises(UnsupportedModel, match=r"packed in torch\.float32"):
        model(PROMPT)
