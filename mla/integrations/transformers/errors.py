"""What cannot be served, and what a compiled model calls as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from mla.errors import MLAError

NO_WEIGHTS = (
    "`use_mla` computes no attention weights: leave output_attentions out, or `restore(model)` and select "
    "eager attention to get them."
)
NOT_CAUSAL = (
    "a layer of this model has is_causal = False, but `use_mla` computes causal attention only: call "
    "`restore(model)` before setting it."
)
NOT_PREPARED = (
    "this config was copied from a model under `use_mla`. Give the model its own config and call "
    "`model.set_attn_implementation('sdpa')` first."
)
NOT_NUMBERED = (
    "the requests of this forward have different lengths in the PagedCache: give position_ids "
    "[batch, tokens]."
)
OWN_MASK = "`use_mla` takes no mask [batch, 1, queries, keys]: give attention_mask [batch, tokens], or none."


class UnsupportedModel(MLAError):
    """A model, a cache or a feature of `transformers` that `use_mla` does not serve."""


def require_inference(*tensors: torch.Tensor, training: bool = False) -> None:
    """Raise `UnsupportedModel` where gradients are wanted: our ops have none."""
    if training or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        raise UnsupportedModel(
            "`use_mla` serves inference: call `model.eval()` and run under `torch.no_grad()`, or "
            "`restore(model)` to train."
        )


# --------------------------------------------------------------------------------------- uncompiled
# What a compiled model calls as it is.

F = TypeVar("F", bound=Callable[..., object])


def uncompiled(function: F) -> F:
    """Keep `torch.compile` out of a function: steps are worked out on the host, and ops are a backend's."""
    disabled: F = torch.compiler.disable(function)
    return disabled
