"""What cannot be served."""

from __future__ import annotations

import torch

from mla.errors import MLAError

NO_WEIGHTS = (
    "`use_mla` computes no attention weights: leave output_attentions out, or `restore(model)` and select "
    "eager attention to get them."
)


class UnsupportedModel(MLAError):
    """A model, a cache or a feature of `transformers` that `use_mla` does not serve."""


def require_inference(x: torch.Tensor, training: bool = False) -> None:
    """Raise `UnsupportedModel` where gradients are wanted: our ops have none."""
    if training or (torch.is_grad_enabled() and x.requires_grad):
        raise UnsupportedModel(
            "`use_mla` serves inference: call `model.eval()` and run under `torch.no_grad()`, or "
            "`restore(model)` to train."
        )
