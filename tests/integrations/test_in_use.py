"""What a model in use refuses besides forwards: moves, copies and guesses of layers that are not prepared."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_refusals import assert_same
from test_tokens import generate
from transformers import GenerationConfig

from mla.integrations.transformers import UnsupportedModel, restore, use_mla

PROMPT = torch.arange(3, 9)[None]


@pytest.mark.parametrize("move", [lambda model: model.to(torch.bfloat16), lambda model: model.half()])
def test_a_model_in_use_is_not_cast(model: Any, move: Callable[[Any], None]) -> None:
    """Its norms would be, and its packed weights would not."""
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    use_mla(model)
    for part in (model, model.model):
        with pytest.raises(UnsupportedModel, match="cannot be moved or cast"):
            move(part)
    assert_same(model, before)
    restore(model)
    assert move(model).lm_head.weight.dtype != torch.float32


@pytest.mark.parametrize("change", [lambda model: model.to("cpu"), lambda model: model.float()])
def test_a_move_that_changes_nothing_passes(model: Any, change: Callable[[Any], Any]) -> None:
    prompt = {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)}
    theirs = generate(model, prompt, max_new_tokens=4)
    use_mla(model)
    for part in (model, model.model, model.model.layers[0].self_attn):
        assert change(part) is part
    assert torch.equal(generate(model, prompt, max_new_tokens=4), theirs)


@pytest.mark.parametrize("change", [lambda part: part.to_empty(device="cpu"), lambda part: part.double()])
def test_other_moves_are_refused_by_every_part(model: Any, change: Callable[[Any], Any]) -> None:
    attention = use_mla(model).model.layers[0].self_attn
    for part in (model, model.model, attention.kv_b_proj, attention.o_proj):
        with pytest.raises(UnsupportedModel, match="cannot be moved or cast"):
            change(part)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_model_in_use_is_not_copied(model: Any, copied: Callable[[Any], Any]) -> None:
    use_mla(model)
    for part in (model, model.model):
        with pytest.raises(UnsupportedModel, match="cannot be copied or pickled"):
            copied(part)


@pytest.mark.parametrize("how", ["by a word", "by a config", "by place", "by the model"])
def test_guesses_of_its_own_layers_are_refused(model: Any, how: str) -> None:
    use_mla(model)
    config = GenerationConfig(use_mtp=True, max_new_tokens=2)
    places: tuple[Any, ...] = (PROMPT, config) if how == "by place" else (PROMPT,)
    words = {"by a word": {"use_mtp": True}, "by a config": {"generation_config": config}}.get(how, {})
    if how == "by the model":
        model.generation_config.use_mtp = True
    with pytest.raises(UnsupportedModel, match="guess tokens for `use_mtp` do not run our ops"):
        model.generate(*places, **words)


def test_methods_of_its_own_come_back(model: Any) -> None:
    calls = list[object]()

    def generate_and_note(*arguments: Any, **words: Any) -> Any:
        calls.append(words)
        return type(model).generate(model, *arguments, **words)

    model.generate = generate_and_note
    use_mla(model).generate(PROMPT, max_new_tokens=1)
    assert len(calls) == 1
    assert restore(model).generate is generate_and_note
