"""Which layers of a model can run our ops, and why it may not be served: asked before anything is changed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from mla.config import MLAConfig
from mla.errors import ConfigError
from mla.integrations.transformers.errors import UnsupportedModel

# A layer's projections; no family has all.
PROJECTIONS = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Survey(NamedTuple):
    """The layers that are to run our ops, and what they have in common."""

    layers: list[Any]
    config: MLAConfig
    dtype: torch.dtype
    device: torch.device


def survey(model: Any) -> Survey:
    """Return what there is to serve. Raises `UnsupportedModel`."""
    if not hasattr(model, "set_attn_implementation"):
        raise UnsupportedModel(f"{type(model).__name__} is no loaded model of `transformers` 5.20 or later.")
    layers = find_attention(model)
    if any(hasattr(layer, "mla_attention") for layer in layers):
        raise UnsupportedModel("this model runs our ops already: call `restore(model)` first.")
    if not layers:
        raise UnsupportedModel(f"{type(model).__name__} has no multi-head latent attention (no kv_b_proj).")
    for layer in layers:
        _check_layer(layer)
    _check_devices(model, layers)
    weight = layers[0].kv_b_proj.weight
    return Survey(layers, _config(model, layers[0]), weight.dtype, weight.device)


def find_attention(model: Any) -> list[Any]:
    """Return the model's latent attention layers, in their order."""
    return [one for one in model.modules() if hasattr(one, "kv_b_proj") and hasattr(one, "kv_a_layernorm")]


def _check_layer(layer: Any) -> None:
    if not hasattr(layer, "expand_kv"):
        raise UnsupportedModel(
            f"{type(layer).__name__} is no class of `transformers`, and caches expanded keys: load the model "
            "without `trust_remote_code`."
        )
    for name in PROJECTIONS:
        linear = getattr(layer, name, None)
        if linear is not None and not _is_plain(linear):
            weight = getattr(linear, "weight", None)
            kind = f"{type(linear).__name__} of {getattr(weight, 'dtype', 'no single dtype')}"
            raise UnsupportedModel(
                f"{name} of this model is a {kind}: load it unquantized and without adapters, in bfloat16, "
                "float16 or float32."
            )


def _is_plain(linear: Any) -> bool:
    """Return whether a projection is its weight and nothing else: no subclass of either, and no hook."""
    if type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter:
        return False
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_hf_hook")
    return linear.weight.dtype in DTYPES and not any(getattr(linear, name, None) for name in hooks)


def _check_devices(model: Any, layers: list[Any]) -> None:
    """Raise `UnsupportedModel` unless all layers are on one device and of one dtype."""
    weights = [layer.kv_b_proj.weight for layer in layers]
    spread = len(set((getattr(model, "hf_device_map", None) or {"": 0}).values())) > 1
    if spread or len({weight.device for weight in weights}) > 1 or weights[0].device.type == "meta":
        raise UnsupportedModel("this model is split over devices: load it on one (without `device_map`).")
    if len({weight.dtype for weight in weights}) > 1:
        raise UnsupportedModel("this model's layers differ in dtype.")


def _config(model: Any, layer: Any) -> MLAConfig:
    """Return the layers' config. Raises `UnsupportedModel`."""
    try:
        config = MLAConfig.from_dict(layer.config.to_dict())
    except ConfigError as error:
        raise UnsupportedModel(f"{type(model).__name__} cannot be served: {error}") from error
    if abs(layer.scaling - config.softmax_scale) > 1e-6 * config.softmax_scale:
        raise UnsupportedModel(
            f"{type(layer).__name__} scales logits by {layer.scaling:.6g}, and its config says "
            f"{config.softmax_scale:.6g}."
        )
    return config
