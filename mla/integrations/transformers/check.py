"""`Check`: what our ops do not do is refused before a layer runs, so that no cache has been written yet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from mla.integrations.transformers.errors import NO_WEIGHTS, OWN_MASK, UnsupportedModel, require_inference
from mla.integrations.transformers.mask import NAME, is_ours
from mla.integrations.transformers.packed import Packed
from mla.integrations.transformers.survey import Survey
from mla.integrations.transformers.uncompiled import uncompiled


class Check:
    """A forward pre-hook of the innermost model, which runs the layers."""

    def __init__(self, found: Survey) -> None:
        self._device = found.device.type
        self._scaled = [(layer, layer.scaling) for layer in found.layers]

    @uncompiled
    def __call__(self, model: Any, arguments: tuple[Any, ...], words: dict[str, Any]) -> None:
        """Raise `UnsupportedModel` for a forward that cannot be served."""
        tensors = list(_tensors((*arguments, *words.values())))
        if words.get("output_attentions", model.config.output_attentions):
            raise UnsupportedModel(NO_WEIGHTS)
        if any(one.ndim == 4 and not is_ours(one) for one in tensors):
            raise UnsupportedModel(OWN_MASK)
        if torch.is_autocast_enabled(self._device):
            raise UnsupportedModel(
                "`use_mla` computes in the dtype of the model's weights: leave autocast out."
            )
        self._check_layers(model)
        require_inference(*tensors, training=torch.is_grad_enabled() and _trains(model))

    def _check_layers(self, model: Any) -> None:
        if model.config._attn_implementation != NAME:
            raise UnsupportedModel(
                f"{model.config._attn_implementation} attention was selected for a model that runs our ops: "
                "call `restore(model)` before."
            )
        for layer, scaling in self._scaled:
            if layer.training:
                require_inference(training=True)
            if layer.scaling != scaling:
                raise UnsupportedModel(
                    f"layer {layer.layer_idx} scales logits by {layer.scaling:.6g}, and by {scaling:.6g} "
                    "when `use_mla` was called: call `restore(model)` before it is changed."
                )


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors among a forward's arguments; masks may be several in a dict."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def _trains(model: Any) -> bool:
    """Return whether a weight wants gradients: asked only where they are kept, since it takes a while."""
    packed = (one.trains for one in model.modules() if isinstance(one, Packed))
    return any(packed) or any(weight.requires_grad for weight in model.parameters())
