"""Models generate the same tokens with our ops as without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, make_model

from mla.integrations.transformers import restore, use_mla

Prompts = dict[str, torch.Tensor]


def generate(model: Any, prompts: Prompts, **words: Any) -> Any:
    """Generate with a fixed seed; greedily unless `words` say otherwise."""
    torch.manual_seed(3)
    words = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None, **words}
    return model.generate(**prompts, **words)


def both(model: Any, prompts: Prompts, **words: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens without our ops, and with them."""
    theirs = generate(model, prompts, **words)
    return theirs, generate(use_mla(model), prompts, **words)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_generates_the_same_tokens(family: str, prompts: Prompts) -> None:
    theirs, ours = both(make_model(family), prompts, max_new_tokens=200)
    assert torch.equal(theirs, ours)
    assert len(set(ours[0].tolist())) > 9, "tokens that repeat would hide a difference"


@pytest.mark.parametrize(
    "words",
    [
        {"num_beams": 3},
        {"do_sample": True, "temperature": 0.7},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 4},
        {"use_cache": False, "max_new_tokens": 12},
        {"num_return_sequences": 2, "do_sample": True},
    ],
    ids=lambda words: "-".join(words),
)
def test_every_way_to_generate_gives_the_same_tokens(
    model: Any, prompts: Prompts, words: dict[str, Any]
) -> None:
    theirs, ours = both(model, prompts, **words)
    assert torch.equal(theirs, ours)


def test_a_request_of_padding_alone_spoils_no_other(model: Any, prompts: Prompts) -> None:
    """`transformers` gives such a row whatever it likes; the others must not notice."""
    prompts["attention_mask"][0] = 0
    theirs, ours = both(model, prompts)
    assert torch.equal(theirs[1:], ours[1:])


def test_a_cache_made_without_our_ops_goes_on_with_them_and_back(model: Any, prompts: Prompts) -> None:
    words = {"return_dict_in_generate": True, "max_new_tokens": 20}
    first = generate(model, prompts, **words)
    whole = generate(model, prompts, max_new_tokens=60)

    def go_on(found: Any) -> Any:
        ids = found.sequences
        mask = torch.cat((prompts["attention_mask"], ids.new_ones(3, ids.shape[1] - 11)), dim=1)
        name = "cache" if hasattr(found, "cache") else "past_key_values"  # as older releases call it
        held = {name: getattr(found, name)}
        return generate(model, {"input_ids": ids, "attention_mask": mask}, **held, **words)

    use_mla(model)
    second = go_on(first)
    restore(model)
    third = go_on(second)
    assert torch.equal(third.sequences, whole)


def test_a_mask_of_ones_and_no_mask_are_the_same(model: Any) -> None:
    use_mla(model)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        outputs = [model(input_ids=ids, attention_mask=mask).logits for mask in (None, torch.ones_like(ids))]
    assert torch.equal(*outputs)


def test_bf16_is_as_close_to_fp32_as_theirs(prompts: Prompts) -> None:
    exact = make_model("deepseek_v3")(**prompts).logits[:, -1].detach().double()
    errors = []
    for prepare in (lambda model: model, use_mla):
        model = prepare(make_model("deepseek_v3", torch.bfloat16))
        with torch.no_grad():
            found = model(**prompts).logits[:, -1].double()
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors[1] < 1.3 * errors[0]
