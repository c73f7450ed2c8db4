"""Loading a model directory, for the examples: what goes wrong is one sentence, whoever raises it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from mla import load_backend

try:
    import mla.integrations.transformers as _  # noqa: F401
except ImportError as error:
    sys.exit(f"error: {error}")
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(model_dir: str, backend: str, dtype: str = "auto") -> tuple[Any, Any]:
    """Return a directory's model, on the device of a backend, and its tokenizer.

    Raises `click.ClickException` for a directory that holds none, and `BackendError`, before the model is
    read, for a backend that is not there.
    """
    device = load_backend(backend).device
    with _said("model", model_dir):
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).eval().to(device)
    with _said("tokenizer", model_dir):
        return model, AutoTokenizer.from_pretrained(model_dir)


@contextmanager
def _said(what: str, model_dir: str) -> Iterator[None]:
    """Say in one line what `transformers` and the libraries below it raise, of whatever kind."""
    try:
        yield
    except Exception as error:
        reason = " ".join((str(error) or type(error).__name__).split())
        raise click.ClickException(f"{model_dir} has no {what} that can be loaded: {reason}") from error
