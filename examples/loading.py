"""Loading a model directory, for the examples: any error becomes one sentence."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from mla import load_backend
from mla.errors import MLAError
from mla_backends import BackendError

try:
    import mla.integrations.transformers as _  # noqa: F401
except ImportError as error:
    sys.exit(f"error: {error}")
from transformers import AutoModelForCausalLM, AutoTokenizer

# Of users' mistakes, and of memory: a host's that runs out is a plain RuntimeError of torch.
EXPECTED = (MLAError, BackendError, ValueError, RuntimeError, MemoryError)


def load(model_dir: str, backend: str, dtype: str = "auto") -> tuple[Any, Any]:
    """Return a directory's model, on the device of a backend, and its tokenizer.

    Raises `click.ClickException` for a directory that holds none, and `BackendError`, before the model is
    read, for a backend that is not there.
    """
    device = load_backend(backend).device
    with one_sentence(f"{model_dir} has no model that can be loaded: ", (Exception,)):
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).eval()
    with one_sentence(f"{model_dir} has no tokenizer that can be loaded: ", (Exception,)):
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
    return model.to(device), tokenizer


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end a text: what the model generates with says which, or else its tokenizer."""
    asked = (model.generation_config.eos_token_id, tokenizer.eos_token_id)
    tokens: int | list[int] = next((ids for ids in asked if ids is not None), [])
    return {tokens} if isinstance(tokens, int) else set(tokens)


@contextmanager
def one_sentence(what: str = "", kinds: tuple[type[Exception], ...] = EXPECTED) -> Iterator[None]:
    """Say in one line what errors of these kinds say."""
    try:
        yield
    except kinds as error:
        reason = " ".join((str(error) or type(error).__name__).split())
        raise click.ClickException(f"{what}{reason}") from error
