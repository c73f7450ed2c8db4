"""Generation from a paged cache gives the tokens of a stock one, and pages are given back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_tokens import Prompts, generate
from tiny_models import CACHE, make_model

from mla.errors import MLAError
from mla.integrations.transformers import PagedCache, UnsupportedModel, restore, use_mla


def paged(model: Any, **words: Any) -> dict[str, Any]:
    return {CACHE: PagedCache(model, **{"max_tokens": 4096, "page_size": 16, **words})}


@pytest.mark.parametrize("family", ["deepseek_v2", "longcat_flash"])
@pytest.mark.parametrize("words", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}], ids=str)
def test_it_gives_the_same_tokens(family: str, prompts: Prompts, words: dict[str, Any]) -> None:
    model = make_model(family)
    theirs = generate(model, prompts, **words)
    use_mla(model)
    cache = paged(model)
    assert torch.equal(generate(model, prompts, **cache, **words), theirs)
    latents = cache[CACHE].latents
    latents.release(cache[CACHE]._sequences)
    assert latents.free_pages == latents.num_pages


def test_padding_takes_no_pages(model: Any, prompts: Prompts) -> None:
    use_mla(model)
    cache = paged(model, page_size=4)[CACHE]
    with torch.no_grad():
        model(**prompts, **{CACHE: cache})
    assert [cache.latents.length(sequence) for sequence in cache._sequences] == [7, 4, 11]
    assert cache.latents.num_pages - cache.latents.free_pages == 2 + 1 + 3


def test_a_full_cache_is_one_sentence(model: Any, prompts: Prompts) -> None:
    use_mla(model)
    with pytest.raises(MLAError, match="free pages"):
        generate(model, prompts, **paged(model, max_tokens=64))


def test_it_needs_a_model_that_runs_our_ops(model: Any, prompts: Prompts) -> None:
    with pytest.raises(UnsupportedModel, match="use_mla"):
        PagedCache(model, max_tokens=64)
    cache = paged(use_mla(model))
    restore(model)
    with pytest.raises(UnsupportedModel, match="does not run our ops any more"):
        generate(model, prompts, **cache)


def test_a_hybrid_model_has_state_that_it_does_not_hold() -> None:
    with pytest.raises(UnsupportedModel, match="layers of other kinds"):
        PagedCache(use_mla(make_model("kimi_linear")), max_tokens=64)


def test_a_mask_that_contradicts_the_cache(model: Any, prompts: Prompts) -> None:
    cache = paged(use_mla(model))
    with torch.no_grad():
        model(**prompts, **cache)
        mask = torch.ones(3, 12, dtype=torch.int64)
        with pytest.raises(UnsupportedModel, match=r"names \[12, 12, 12\] tokens .* holds \[7, 4, 11\]"):
            model(input_ids=prompts["input_ids"][:, :1], attention_mask=mask, **cache)


def test_padding_on_the_right_is_refused(model: Any) -> None:
    cache = paged(use_mla(model))
    mask = torch.tensor([[1, 1, 0]])
    with torch.no_grad(), pytest.raises(UnsupportedModel, match="padding on the left alone"):
        model(input_ids=torch.tensor([[3, 4, 0]]), attention_mask=mask, **cache)
