"""Which layers of a model can run our ops, and why it may not be served: asked before anything is changed."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import nn

from mla.config import MLAConfig
from mla.errors import ConfigError
from mla.integrations.transformers.errors import NO_WEIGHTS, NOT_CAUSAL, NOT_PREPARED, UnsupportedModel
from mla.integrations.transformers.mask import NAME

# A layer's projections; no family has all.
PROJECTIONS = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_hf_hook")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Survey(NamedTuple):
    """The layers that are to run our ops, and what they have in common."""

    layers: list[Any]
    models: list[Any]  # those that hold them, from the outermost one
    owner: Any  # of these the language model, whose config says what all of them attend with
    config: MLAConfig
    dtype: torch.dtype
    device: torch.device


def survey(model: Any) -> Survey:
    """Return what there is to serve. Raises `UnsupportedModel`."""
    if isinstance(model, type) or not hasattr(model, "set_attn_implementation"):
        raise UnsupportedModel(f"{type(model).__name__} is no loaded model of `transformers` 5.20 or later.")
    layers = find_attention(model)
    if any(hasattr(layer, "mla_attention") for layer in layers):
        raise UnsupportedModel("this model runs our ops already: call `restore(model)` first.")
    if not layers:
        raise UnsupportedModel(f"{type(model).__name__} has no multi-head latent attention (no kv_b_proj).")
    models = [
        one for one in model.modules() if hasattr(one, "set_attn_implementation") and find_attention(one)
    ]
    _check_placement(model, layers)
    config = _config(model, layers)
    for layer in layers:
        _check_layer(layer)
    _check_shared(model, layers)
    weight = layers[0].kv_b_proj.weight
    if len(dtypes := {linear.weight.dtype for layer in layers for _, linear in _projections(layer)}) > 1:
        raise UnsupportedModel(
            f"this model's projections differ in dtype ({', '.join(sorted(map(str, dtypes)))}): cast it to "
            "one with `model.to(...)`."
        )
    owner = _owner(model, models, layers)
    _check_scaling(layers, config)
    return Survey(layers, models, owner, config, weight.dtype, weight.device)


def find_attention(model: Any) -> list[Any]:
    """Return the model's latent attention layers, in their order."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return [one for one in modules if hasattr(one, "kv_b_proj") and hasattr(one, "kv_a_layernorm")]


def _owner(model: Any, models: list[Any], layers: list[Any]) -> Any:
    """Return the model that all layers have their config from; other parts attend as they did."""
    owner = next((one for one in models if all(layer.config is one.config for layer in layers)), None)
    if owner is None:
        raise UnsupportedModel(
            f"{type(model).__name__} holds several language models: call `use_mla` on each of them."
        )
    if any(one.config.output_attentions for one in models):
        raise UnsupportedModel(NO_WEIGHTS)
    if owner.config._attn_implementation == NAME:
        raise UnsupportedModel(NOT_PREPARED)
    return owner


def _check_placement(model: Any, layers: list[Any]) -> None:
    """Raise `UnsupportedModel` unless all layers are on one device, and stay there."""
    devices = {str(weight.device) for layer in layers for weight in layer.parameters()}
    mapped = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(devices) > 1 or len(mapped) > 1 or "meta" in devices:
        places = ", ".join(sorted(map(str, mapped or devices)))
        raise UnsupportedModel(
            f"this model is split over devices or offloaded ({places}): load it on one, without `device_map`."
        )


def _check_layer(layer: Any) -> None:
    if not hasattr(layer, "expand_kv"):
        raise UnsupportedModel(
            f"{type(layer).__name__} is no class of `transformers`, and caches expanded keys: load the model "
            "without `trust_remote_code`."
        )
    if "expand_kv" in vars(layer):
        raise UnsupportedModel(
            f"{type(layer).__name__} has an expand_kv of its own, which our ops would leave out: "
            "take it away first."
        )
    if not getattr(layer, "is_causal", True):
        raise UnsupportedModel(NOT_CAUSAL)
    for name, linear in _projections(layer):
        if more := _more_than_a_weight(linear, name != "kv_b_proj"):
            raise UnsupportedModel(
                f"{name} of this model is {more}: load it unquantized, without adapters or offloading, in "
                "bfloat16, float16 or float32."
            )


def _check_shared(model: Any, layers: list[Any]) -> None:
    """Raise `UnsupportedModel` where packing a projection would take its weight from somebody else."""
    modules = Counter(id(linear) for layer in layers for _, linear in _projections(layer))
    weights = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    for layer in layers:
        for name, linear in _projections(layer):
            if modules[id(linear)] > 1 or weights[id(linear.weight)] > 1:
                raise UnsupportedModel(
                    f"{name} of layer {layer.layer_idx} shares its weight with another module, which packing "
                    "would leave without one: untie them first."
                )


def _projections(layer: Any) -> list[tuple[str, Any]]:
    found = [(name, getattr(layer, name, None)) for name in PROJECTIONS]
    return [(name, linear) for name, linear in found if linear is not None]


def _more_than_a_weight(linear: Any, may_have_bias: bool) -> str:
    """Return what a projection is if it is not its weight (and bias) and nothing else; "" if it is."""
    kind, weight = type(linear), getattr(linear, "weight", None)
    if kind is not nn.Linear:
        return f"{kind.__module__}.{kind.__name__}"
    if type(weight) is not nn.Parameter:
        return f"an nn.Linear whose weight is a {type(weight).__name__}"
    if weight.dtype not in DTYPES:
        return f"an nn.Linear of {weight.dtype}"
    if "forward" in vars(linear):
        return "an nn.Linear with a forward of its own"
    if linear.bias is not None and not may_have_bias:
        return "an nn.Linear with a bias"
    hooked = weight._backward_hooks or any(getattr(linear, name, None) for name in HOOKS)
    return "an nn.Linear with hooks" if hooked else ""


def _config(model: Any, layers: list[Any]) -> MLAConfig:
    """Return the layers' config. Raises `UnsupportedModel`."""
    try:
        return MLAConfig.from_dict(layers[0].config.to_dict())
    except ConfigError as error:
        raise UnsupportedModel(f"{type(model).__name__} cannot be served: {error}") from error


def _check_scaling(layers: list[Any], config: MLAConfig) -> None:
    for layer in layers:
        if abs(layer.scaling - config.softmax_scale) > 1e-6 * config.softmax_scale:
            raise UnsupportedModel(
                f"{type(layer).__name__} scales logits by {layer.scaling:.6g}, and its config says "
                f"{config.softmax_scale:.6g}."
            )
