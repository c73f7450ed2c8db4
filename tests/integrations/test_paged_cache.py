"""Generation from a paged cache gives the tokens of a stock one, and pages are given back."""

from __future__ import annotations

import copy
from itertools import count
from typing import Any

import pytest
import torch
from test_tokens import Prompts, generate
from tiny_models import CACHE, FAMILIES, make_model

from mla.cache import LatentCache
from mla.errors import CacheFull
from mla.integrations.transformers import PagedCache, UnsupportedModel, restore, use_mla


def paged(model: Any, **words: Any) -> dict[str, Any]:
    return {CACHE: PagedCache(model, **{"max_tokens": 4096, "page_size": 16, **words})}


@pytest.mark.parametrize("family", ["deepseek_v2", "longcat_flash"])
@pytest.mark.parametrize("words", [{}, {"prefill_chunk_size": 4}], ids=str)
def test_it_gives_the_same_tokens(family: str, prompts: Prompts, words: dict[str, Any]) -> None:
    model = make_model(family)
    theirs = generate(model, prompts, **words)
    use_mla(model)
    cache = paged(model)
    assert torch.equal(generate(model, prompts, **cache, **words), theirs)
    latents = cache[CACHE].latents
    latents.release(cache[CACHE]._sequences)
    assert latents.free_pages == latents.num_pages


@pytest.mark.parametrize(("name", "most"), [("bf16", 0.01), ("fp8", 0.2)])
def test_it_holds_a_format(model: Any, prompts: Prompts, name: str, most: float) -> None:
    """Logits are near those of a float32 cache, as far as the format allows; stock caches do not hold it."""
    with torch.no_grad():
        theirs = model(**prompts).logits
        use_mla(model, cache_format=name)
        cache = paged(model)
        ours = model(**prompts, **cache).logits
        assert most / 50 < ((ours - theirs).norm() / theirs.norm()).item() < most
        assert cache[CACHE].latents.pages.dtype == torch.uint8
        with pytest.raises(UnsupportedModel, match=f"only a PagedCache holds {name}"):
            model(**prompts)


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_it_holds_index_keys_in_a_format(family: str, prompts: Prompts) -> None:
    """What is attended differs by where keys near each other fall; stock caches do not hold them."""
    model = make_model(family)
    with torch.no_grad():
        theirs = model(**prompts).logits
        use_mla(model, index_format="fp8")
        cache = paged(model)
        ours = model(**prompts, **cache).logits
        assert 0 < ((ours - theirs).norm() / theirs.norm()).item() < 0.5
        assert cache[CACHE].latents.index_pages.dtype == torch.uint8
        with pytest.raises(UnsupportedModel, match="only a PagedCache holds fp8"):
            model(**prompts)
    restore(model)
    with pytest.raises(
        UnsupportedModel, match="has no indexer, and so no index keys: leave index_format out"
    ):
        use_mla(make_model("deepseek_v3"), index_format="fp8")
    restore(use_mla(make_model("deepseek_v3"), index_format="plain"))


@pytest.mark.parametrize("formats", [{}, {"cache_format": "fp8", "index_format": "fp8"}])
def test_copies_of_requests_are_copies_of_their_bytes(prompts: Prompts, formats: dict[str, str]) -> None:
    """Whatever these are: decoding and encoding again would change some."""
    model = use_mla(make_model("deepseek_v32"), **formats)
    cache = paged(model)[CACHE]
    with torch.no_grad():
        model(**prompts, **{CACHE: cache})
    latents = cache.latents
    for pages in (latents.pages, latents.index_pages):
        pages.view(torch.uint8).random_(0, 256)
    twin = copy.deepcopy(cache)
    for source, sequence in zip(cache._sequences, twin._sequences, strict=True):
        assert twin.latents.length(sequence) == latents.length(source)
        for held, copied in (
            (latents.pages, twin.latents.pages),
            (latents.index_pages, twin.latents.index_pages),
        ):
            before, after = held[:, latents._get(source).pages], copied[:, twin.latents._get(sequence).pages]
            assert torch.equal(before.view(torch.uint8), after.view(torch.uint8))


def test_padding_takes_no_pages(model: Any, prompts: Prompts) -> None:
    use_mla(model)
    cache = paged(model, page_size=4)[CACHE]
    with torch.no_grad():
        model(**prompts, **{CACHE: cache})
    assert [cache.latents.length(sequence) for sequence in cache._sequences] == [7, 4, 11]
    assert cache.latents.num_pages - cache.latents.free_pages == 2 + 1 + 3


def test_it_needs_a_model_that_runs_our_ops(model: Any, prompts: Prompts) -> None:
    with pytest.raises(UnsupportedModel, match="use_mla"):
        PagedCache(model, max_tokens=64)
    cache = paged(use_mla(model))
    restore(model)
    with pytest.raises(UnsupportedModel, match="no longer runs our ops"):
        generate(model, prompts, **cache)


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"kimi_linear", "bailing_hybrid"}))
def test_a_model_without_our_ops_does_not_read_it(family: str, prompts: Prompts) -> None:
    """Not even for the first token, though the model has the layers of the one that the cache is for."""
    cache = paged(use_mla(make_model(family)))
    with pytest.raises(UnsupportedModel, match="call `use_mla` on this model first"):
        generate(make_model(family), prompts, **cache, max_new_tokens=1)


def test_a_model_of_other_numbers_does_not_write_to_it(model: Any, prompts: Prompts) -> None:
    cache = paged(use_mla(model))
    with pytest.raises(UnsupportedModel, match=r"40 numbers of torch\.float32 a token, .* make a PagedCache"):
        generate(use_mla(restore(model).to(torch.bfloat16)), prompts, **cache)
    latents = cache[CACHE].latents
    assert (cache[CACHE].columns, latents.free_pages) == (0, latents.num_pages)


def test_it_keeps_the_order_of_its_requests(model: Any) -> None:
    """For who searches beams without `generate`, which is refused before."""
    with pytest.raises(UnsupportedModel, match="use a stock cache for beams"):
        paged(use_mla(model))[CACHE].reorder_cache(torch.tensor([1, 0]))


def test_a_hybrid_model_has_state_that_it_does_not_hold() -> None:
    with pytest.raises(UnsupportedModel, match="layers without latent attention"):
        PagedCache(use_mla(make_model("kimi_linear")), max_tokens=64)


def test_a_mask_that_contradicts_the_cache(model: Any, prompts: Prompts) -> None:
    cache = paged(use_mla(model))
    with torch.no_grad():
        model(**prompts, **cache)
        mask = torch.ones(3, 12, dtype=torch.int64)
        with pytest.raises(UnsupportedModel, match=r"names \[12, 12, 12\] tokens .* holds \[7, 4, 11\]"):
            model(input_ids=prompts["input_ids"][:, :1], attention_mask=mask, **cache)


def of_two_lengths(model: Any) -> tuple[PagedCache, list[int]]:
    """Return a cache of two sequences, of 5 and 9 tokens, each prefilled alone."""
    cache: PagedCache = paged(use_mla(model))[CACHE]
    sequences = cache.latents.new_sequences(2)
    for sequence, tokens in zip(sequences, (5, 9), strict=True):
        cache.use([sequence])
        model(input_ids=torch.arange(3, 3 + tokens)[None], **cache.argument)
    return cache, sequences


@torch.no_grad()
def test_requests_of_different_lengths_must_say_where_they_go_on(model: Any) -> None:
    cache, sequences = of_two_lengths(model)
    cache.use(sequences)
    words = {
        "input_ids": torch.tensor([[7], [8]]),
        "attention_mask": torch.tensor([[0] * 4 + [1] * 6, [1] * 10]),
    }
    with pytest.raises(UnsupportedModel, match="give position_ids"):
        model(**words, **cache.argument)
    ours = model(**words, position_ids=torch.tensor([[5], [9]]), **cache.argument).logits
    restore(model)
    for row, (tokens, new) in enumerate(((5, 7), (9, 8))):
        theirs = model(input_ids=torch.tensor([[*range(3, 3 + tokens), new]])).logits[:, -1]
        assert torch.allclose(ours[row], theirs, atol=1e-5)


@torch.no_grad()
def test_a_request_that_was_released_is_no_part_of_a_forward(model: Any) -> None:
    cache, sequences = of_two_lengths(model)
    cache.use(sequences)
    cache.latents.release(sequences[1:])
    assert cache.get_seq_length() == 5
    logits = model(input_ids=torch.tensor([[7]]), **cache.argument).logits[:, -1]
    restore(model)
    theirs = model(input_ids=torch.tensor([[*range(3, 8), 7]])).logits[:, -1]
    assert torch.allclose(logits, theirs, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("released", [[], [0], [0, 1]])
def test_reset_forgets_all_sequences(model: Any, released: list[int]) -> None:
    """Those of the last forward and others, and not those that a server has released itself."""
    cache, sequences = of_two_lengths(model)
    cache.latents.release([sequences[index] for index in released])
    made = copy.deepcopy(cache)
    assert (made.latents.sequences, made.columns) == (([], 0) if 1 in released else ([0], 9))
    if len(released) == 2:
        model(input_ids=torch.arange(3, 9)[None], **cache.argument)
    cache.reset()
    latents = cache.latents
    assert (latents.sequences, latents.free_pages, cache.columns) == ([], latents.num_pages, 0)
    model(input_ids=torch.arange(3, 9)[None], **cache.argument)


def test_padding_on_the_right_is_refused(model: Any) -> None:
    cache = paged(use_mla(model))
    mask = torch.tensor([[1, 1, 0]])
    with torch.no_grad(), pytest.raises(UnsupportedModel, match="padding on the left alone"):
        model(input_ids=torch.tensor([[3, 4, 0]]), attention_mask=mask, **cache)


def test_what_was_refused_leaves_it_as_it_was(model: Any, prompts: Prompts) -> None:
    """A request that is too long ends, and the next one is served."""
    use_mla(model)
    expected = generate(model, prompts)
    cache = paged(model, max_tokens=12 * 16)
    with pytest.raises(CacheFull):
        generate(model, prompts, **cache, max_new_tokens=70)
    cache[CACHE].reset()
    with pytest.raises(CacheFull), torch.no_grad():
        model(input_ids=torch.full((1, 300), 5), **cache)
    latents = cache[CACHE].latents
    assert (cache[CACHE].columns, latents.free_pages) == (0, latents.num_pages)
    assert torch.equal(generate(model, prompts, **cache, max_new_tokens=30), expected[:, : 11 + 30])


@torch.no_grad()
@pytest.mark.parametrize("encodes", [1, 2])
def test_a_forward_that_broke_off_is_noticed_by_the_next(
    model: Any, prompts: Prompts, encodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers, from the first or from the second and last one on, lack its tokens."""
    encoded, calls = LatentCache.encoded, count(1)

    def fail(*arguments: Any) -> Any:
        if next(calls) == encodes:
            raise MemoryError
        return encoded(*arguments)

    cache = paged(use_mla(model))[CACHE]
    expected = model(**prompts, **cache.argument).logits
    cache.reset()
    with monkeypatch.context() as broken:
        broken.setattr(LatentCache, "encoded", fail)
        with pytest.raises(MemoryError):
            model(**prompts, **cache.argument)
    mask = torch.cat((prompts["attention_mask"], torch.ones(3, 1, dtype=torch.int64)), dim=1)
    for held in (copy.deepcopy(cache), cache):
        with pytest.raises(UnsupportedModel, match="broke off: call `reset"):
            model(input_ids=torch.full((3, 1), 7), attention_mask=mask, **held.argument)
    cache.reset()
    assert torch.equal(model(**prompts, **cache.argument).logits, expected)


@torch.no_grad()
def test_a_forward_of_no_tokens_is_whole(model: Any, prompts: Prompts) -> None:
    """No layer writes any, as all are padding."""
    cache = paged(use_mla(model))[CACHE]
    nothing = {"input_ids": torch.full((3, 2), 7), "attention_mask": torch.zeros(3, 2, dtype=torch.int64)}
    model(**nothing, **cache.argument)
    mask = torch.nn.functional.pad(prompts["attention_mask"], (2, 0))
    logits = model(input_ids=prompts["input_ids"], attention_mask=mask, **cache.argument).logits
    assert logits.shape[:2] == prompts["input_ids"].shape


def test_tokens_are_cropped(model: Any, prompts: Prompts) -> None:
    cache = paged(use_mla(model))[CACHE]
    with torch.no_grad():
        whole = model(**prompts, **{CACHE: cache}).logits[:, -1]
        cache.crop(-1)
        assert cache.get_seq_length() == 10
        last = prompts["input_ids"][:, -1:]
        again = model(input_ids=last, attention_mask=prompts["attention_mask"], **{CACHE: cache}).logits[
            :, -1
        ]
    assert torch.allclose(whole, again, atol=1e-4)
    with pytest.raises(ValueError, match="negative"):
        cache.layers[0].crop(5)


def test_a_prompt_is_used_again_from_a_copy(model: Any, prompts: Prompts) -> None:
    """As `transformers` documents for its caches."""
    alone = [generate(model, prompts, max_new_tokens=count) for count in (20, 30)]
    use_mla(model)
    held = paged(model)[CACHE]
    without_last = {name: tensor[:, :-1] for name, tensor in prompts.items()}
    generate(model, without_last, **{CACHE: held}, max_new_tokens=1)
    for expected in alone:
        words = {CACHE: copy.deepcopy(held), "max_new_tokens": expected.shape[1] - 11}
        assert torch.equal(generate(model, prompts, **words), expected)
        assert held.get_seq_length() == 10
