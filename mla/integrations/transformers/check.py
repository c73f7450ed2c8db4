"""`Check`: what our ops do not do is refused before a layer runs, so that no cache has been written yet."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers.cache_utils import Cache

from mla.integrations.transformers.errors import (
    NO_WEIGHTS,
    NOT_CAUSAL,
    NOT_NUMBERED,
    OWN_MASK,
    UnsupportedModel,
    require_inference,
)
from mla.integrations.transformers.mask import NAME, is_ours
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
        values = (*arguments, *words.values())
        tensors, caches = list(_tensors(values)), [one for one in values if isinstance(one, Cache)]
        if words.get("output_attentions", model.config.output_attentions):
            raise UnsupportedModel(NO_WEIGHTS)
        masks = [one for one in tensors if one.ndim == 4]
        if masks or not caches or any(getattr(one, "is_uneven", False) for one in caches):
            _check_shapes(_bound(model, arguments, words), masks, caches)
        if torch.is_autocast_enabled(self._device):
            raise UnsupportedModel(
                "`use_mla` computes in the dtype of the model's weights: leave autocast out."
            )
        self._check_layers(model)
        for cache in caches:
            _check_cache(cache)
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
            if not getattr(layer, "is_causal", True):
                raise UnsupportedModel(NOT_CAUSAL)
            if layer.scaling != scaling:
                raise UnsupportedModel(
                    f"layer {layer.layer_idx} scales logits by {layer.scaling:.6g}, and by {scaling:.6g} "
                    "when `use_mla` was called: call `restore(model)` before it is changed."
                )


def _bound(model: Any, arguments: tuple[Any, ...], words: dict[str, Any]) -> dict[str, Any]:
    """Return a forward's arguments by name: asked only where they are looked at, since it takes a while."""
    return inspect.signature(model.forward).bind_partial(*arguments, **words).arguments


def _check_shapes(given: dict[str, Any], masks: list[torch.Tensor], caches: list[Cache]) -> None:
    """Raise `UnsupportedModel` for masks of another step, and for positions that nobody names."""
    if not all(map(is_ours, masks)):
        raise UnsupportedModel(OWN_MASK)
    inputs = (given.get(name) for name in ("input_ids", "inputs_embeds"))
    shape = next((one.shape[:2] for one in inputs if one is not None), None)
    if shape is None:
        return  # the model says that it needs them
    if not all(_is_of_this_step(one, shape, caches) for one in masks):
        raise UnsupportedModel(OWN_MASK)
    mask = given.get("attention_mask")
    if not caches and isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape != shape:
        raise UnsupportedModel(
            f"attention_mask has shape {list(mask.shape)}, and there are {shape[1]} tokens of {shape[0]} "
            "requests: without a cache, `use_mla` takes a mask [batch, tokens] of these."
        )
    if given.get("position_ids") is None and any(getattr(cache, "is_uneven", False) for cache in caches):
        raise UnsupportedModel(NOT_NUMBERED)


def _is_of_this_step(mask: torch.Tensor, shape: torch.Size, caches: list[Cache]) -> bool:
    """Return whether `visible_keys` made a mask [B, 1, 1, s] for this step of B, t = shape tokens."""
    batch, queries = shape
    if not is_ours(mask, queries) or mask.shape[0] != batch:
        return False
    held: list[Any] = [cache.get_seq_length() for cache in caches]
    if any(isinstance(one, torch.Tensor) and one.device.type != "cpu" for one in held):
        return True  # or the device would be waited for
    return bool(mask.shape[-1] == queries + sum(map(int, held)))


def _check_cache(cache: Cache) -> None:
    """Raise `UnsupportedModel` for a cache of which a layer has dropped tokens."""
    layer: Any
    for index, layer in enumerate(cache.layers):
        if getattr(layer, "is_sliding", False) and layer.get_mask_sizes(1)[1]:
            raise UnsupportedModel(
                f"layer {index} of this cache keeps a window of tokens and has dropped some: `use_mla` needs "
                "all of them."
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
    return any(weight.requires_grad for weight in model.parameters())
