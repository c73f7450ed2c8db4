"""Every family generates the same tokens in every way that `transformers` knows, on stock caches and on ours.

All requests but one cross the end of a page; one family's cross three in the ways that differ most.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from test_tokens import Prompts, generate
from tiny_models import CACHE, FAMILIES, make_model

from mla.integrations.transformers import PagedCache, use_mla

Way = Callable[..., torch.Tensor]  # (model, prompts, new, cache=) -> tokens, of which so many are new
# Their other layers take no guesses back, and have state that no page holds.
STATEFUL = ("kimi_linear", "bailing_hybrid")
# 200 tokens of a family without experts, which is cheap.
LONG_RUNS = {
    ("minicpm3", way)
    for way in ("sampled", "beams", "chunked prefill", "goes on", "no cache", "static", "prompt lookup")
}
PROMPT = 60  # tokens of the longest


def ask(**words: Any) -> Way:
    return lambda model, prompts, new, **cache: generate(model, prompts, max_new_tokens=new, **words, **cache)


def go_on(more: int) -> Way:
    """Generate half, append a second prompt of so many tokens, and go on from the cache that was returned."""

    def run(model: Any, prompts: Prompts, new: int, **cache: Any) -> torch.Tensor:
        words = {"return_dict_in_generate": True, "max_new_tokens": new // 2}
        first = generate(model, prompts, **words, **cache)
        ids = torch.cat((first.sequences, torch.full((3, more), 7)), dim=1)
        mask = torch.ones_like(ids)
        mask[:, :PROMPT] = prompts["attention_mask"]
        held = {CACHE: getattr(first, CACHE)}
        tokens: torch.Tensor = generate(
            model, {"input_ids": ids, "attention_mask": mask}, **held, **words
        ).sequences
        return tokens

    return run


def guessed(**words: Any) -> Way:
    """Have an assistant, or the prompt, guess tokens, of which some are taken back."""

    def run(model: Any, prompts: Prompts, new: int, **cache: Any) -> torch.Tensor:
        assistant = {} if words else {"assistant_model": stock("deepseek_v2")}
        ids = torch.arange(3, 9).repeat(PROMPT // 6)[None]
        prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return ask(**words, **assistant)(model, prompt, new, **cache)

    return run


def of_padding_alone(model: Any, prompts: Prompts, new: int, **cache: Any) -> torch.Tensor:
    """`transformers` gives a request of padding alone whatever it likes; the others must not notice."""
    mask = prompts["attention_mask"].clone()
    mask[0] = 0
    return ask()(model, {**prompts, "attention_mask": mask}, new, **cache)[1:]


def padded_on_the_right(model: Any, prompts: Prompts, new: int) -> torch.Tensor:
    mask = prompts["attention_mask"].flip(1)
    with torch.no_grad():
        tokens: torch.Tensor = model(prompts["input_ids"], attention_mask=mask).logits.argmax(dim=-1)
    return tokens[mask.bool()]


GUESSED: dict[str, Way] = {
    "assistant": guessed(),
    "prompt lookup": guessed(prompt_lookup_num_tokens=3),
}
WAYS: dict[str, Way] = {
    "greedy": ask(),
    "sampled": ask(do_sample=True, temperature=0.7),
    "several sequences": ask(num_return_sequences=2, do_sample=True),
    "chunked prefill": ask(prefill_chunk_size=25),
    "guidance": ask(guidance_scale=1.5),
    "goes on": go_on(0),
    "second prompt": go_on(5),
    "padding alone": of_padding_alone,
    **GUESSED,
}
STOCK_ALONE: dict[str, Way] = {
    "beams": ask(num_beams=3),
    "sampled beams": ask(num_beams=2, do_sample=True, num_return_sequences=2),
    "no cache": ask(use_cache=False),
    "static": ask(cache_implementation="static"),
    "static beams": ask(cache_implementation="static", num_beams=2),
    "static chunks": ask(cache_implementation="static", prefill_chunk_size=25),
    "right padding": padded_on_the_right,
}


@cache
def stock(family: str) -> Any:
    return make_model(family)


@cache
def ours(family: str) -> Any:
    return use_mla(make_model(family))


def three_prompts() -> Prompts:
    ids = torch.randint(3, 97, (3, PROMPT), generator=torch.Generator().manual_seed(1))
    padding = torch.tensor([[2], [53], [0]])
    return {"input_ids": ids, "attention_mask": (torch.arange(PROMPT) >= padding).long()}


def pairs() -> list[tuple[str, str]]:
    """Return families and ways; to a stateful model nothing is guessed."""
    ways = WAYS | STOCK_ALONE
    return [
        (family, way) for family in FAMILIES for way in ways if family not in STATEFUL or way not in GUESSED
    ]


@pytest.mark.parametrize(("family", "way"), pairs())
def test_tokens_are_the_same_on_every_cache(family: str, way: str) -> None:
    long = way == "greedy" or (family, way) in LONG_RUNS
    asked = three_prompts(), 200 if long else 8
    run, model = (WAYS | STOCK_ALONE)[way], ours(family)
    theirs = run(stock(family), *asked)
    assert torch.equal(run(model, *asked), theirs), "on a stock cache"
    if way in WAYS and family not in STATEFUL:
        held = PagedCache(model, max_tokens=4096, page_size=64 if long else 16)
        assert torch.equal(run(model, *asked, **held.argument), theirs), "on a paged cache"
        held.reset()
        assert held.latents.free_pages == held.latents.num_pages
