"""A model that `torch.compile` traces calls our ops as they are, and generates the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_tokens import Prompts, generate
from tiny_models import CACHE
from transformers import CompileConfig

from mla.integrations.transformers import PagedCache, use_mla

WORDS = {"max_new_tokens": 5}


@pytest.fixture(autouse=True)
def traced_anew() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def graphs() -> int:
    """Return how many graphs have been traced."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_what_generate_compiles_for_a_static_cache(model: Any, prompts: Prompts) -> None:
    """By itself on a GPU; here when it is told to."""
    theirs, before = generate(model, prompts, **WORDS), graphs()
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": config}
    assert torch.equal(generate(use_mla(model), prompts, **WORDS, **static), theirs)
    assert graphs() > before


def test_a_compiled_forward_on_a_paged_cache(model: Any, prompts: Prompts) -> None:
    theirs, before = generate(model, prompts, **WORDS), graphs()
    use_mla(model).forward = torch.compile(model.forward, backend="eager")
    cache = {CACHE: PagedCache(model, max_tokens=4096)}
    assert torch.equal(generate(model, prompts, **WORDS, **cache), theirs)
    assert graphs() > before
