"""`use_mla` and `restore`: a loaded model's attention layers run our ops, and theirs again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import mla
from mla.config import MLAConfig
from mla.errors import ConfigError
from mla.integrations.transformers.attention import Attention, Steps, attend
from mla.integrations.transformers.errors import UnsupportedModel
from mla.integrations.transformers.mask import NAME, visible_keys
from mla.integrations.transformers.packed import Packed, PackedKvB, PackedLinear
from mla.layer.core import AttentionCore
from mla.layer.expansion import WORKSPACE_BYTES

# A layer's projections besides kv_b_proj; no family has all.
PROJECTIONS = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")


def use_mla(model: Any, backend: str = "cpu", **arguments: Any) -> Any:
    """Have a loaded `transformers` model attend its cached latents through our ops; return it.

    `arguments` are those of `mla.load_backend`. Caches, generation and all other layers stay those of
    `transformers`. Raises `UnsupportedModel`, before anything is changed, for a model that cannot be served,
    and `BackendError` for a backend that is not there.
    """
    layers = find_layers(model)
    config, dtype = _config(model, layers[0]), _dtype(layers)
    opened = mla.load_backend(backend, **arguments)
    assert opened.device is not None
    steps = Steps(dtype, opened.device, WORKSPACE_BYTES)
    _register()
    before = model.config._attn_implementation
    for layer in layers:
        core = AttentionCore(config, backend=opened, dtype=dtype, scratch=steps.scratch)
        core.load(layer.kv_b_proj.weight)
        layer.kv_b_proj, layer.mla_attention = PackedKvB(layer.kv_b_proj, core), Attention(core, steps)
        layer.expand_kv = _as_they_are
        for name in PROJECTIONS:
            if isinstance(linear := getattr(layer, name, None), nn.Linear):
                setattr(layer, name, PackedLinear(linear, opened.ops(), "auto"))
    model.set_attn_implementation(NAME)
    model.mla_before = before
    return model


def restore(model: Any) -> Any:
    """Undo `use_mla`, bit for bit; return the model.

    Raises `UnsupportedModel` where there is nothing to undo.
    """
    if not hasattr(model, "mla_before"):
        raise UnsupportedModel("this model does not run our ops: there is nothing to restore.")
    for layer in find_attention(model):
        for name, child in list(layer.named_children()):
            if isinstance(child, Packed):
                setattr(layer, name, child.plain())
        del layer.mla_attention, layer.expand_kv
    model.set_attn_implementation(model.mla_before)
    del model.mla_before
    return model


def _as_they_are(latent: torch.Tensor, pe: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the attention function the latents, in the place of keys and values."""
    return latent, pe


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, visible_keys)


def find_attention(model: Any) -> list[Any]:
    """Return the model's latent attention layers, in their order."""
    return [one for one in model.modules() if hasattr(one, "kv_b_proj") and hasattr(one, "kv_a_layernorm")]


def find_layers(model: Any) -> list[Any]:
    """Return the layers that are to run our ops. Raises `UnsupportedModel`."""
    if hasattr(model, "mla_before"):
        raise UnsupportedModel("this model runs our ops already: call `restore(model)` first.")
    if not hasattr(model, "set_attn_implementation"):
        raise UnsupportedModel(f"{type(model).__name__} is no model of `transformers` 5.20 or later.")
    layers = find_attention(model)
    if not layers:
        raise UnsupportedModel(f"{type(model).__name__} has no multi-head latent attention (no kv_b_proj).")
    for layer in layers:
        if not hasattr(layer, "expand_kv"):
            raise UnsupportedModel(
                f"{type(layer).__name__} of this `transformers` caches expanded keys: 5.20 is needed."
            )
        if type(layer.kv_b_proj) is not nn.Linear or not layer.kv_b_proj.weight.is_floating_point():
            raise UnsupportedModel(
                f"kv_b_proj of this model is a {type(layer.kv_b_proj).__name__}: load it unquantized and "
                "without adapters."
            )
    return layers


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


def _dtype(layers: list[Any]) -> torch.dtype:
    """Return the dtype of all layers, which must be on one device. Raises `UnsupportedModel`."""
    weights = [layer.kv_b_proj.weight for layer in layers]
    if len({weight.device for weight in weights}) > 1 or weights[0].device.type == "meta":
        raise UnsupportedModel("this model is split over devices: load it on one (without `device_map`).")
    if len({weight.dtype for weight in weights}) > 1:
        raise UnsupportedModel("this model's layers differ in dtype.")
    return weights[0].dtype
