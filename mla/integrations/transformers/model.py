"""`use_mla` and `restore`: switch a loaded model's attention layers to our ops, and back."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

import mla
from mla.integrations.transformers.admission import (
    NAME,
    PROJECTIONS,
    Check,
    Survey,
    find_attention,
    survey,
    visible_keys,
)
from mla.integrations.transformers.attention import Attention, Steps, attend
from mla.integrations.transformers.errors import UnsupportedModel
from mla.integrations.transformers.indexer import Indexing
from mla.integrations.transformers.packed import Packed, PackedKvB, PackedLinear, guard
from mla.layer.forward import AttentionCore
from mla.layer.plan import WORKSPACE_BYTES
from mla.layer.workspace import Turn
from mla_backends.api import Backend


class Use(NamedTuple):
    """What `restore` undoes. Layers refer to it, so it keeps none of them, nor the models, alive."""

    layers: list[weakref.ref[Any]]
    models: list[weakref.ref[Any]]  # those that hold the layers, from the outermost one that has their config
    before: str  # what they attended with
    guards: dict[weakref.ref[Any], list[Callable[[], None]]]  # of each model, what takes them away


def use_mla(
    model: Any,
    backend: str | Backend = "cpu",
    *,
    cache_format: str | None = None,
    index_format: str | None = None,
    **arguments: Any,
) -> Any:
    """Have a loaded `transformers` model attend its cached latents through our ops; return it.

    `backend` is a name, with `arguments` of `mla.load_backend`, or what that returned. With a `cache_format`
    other than the model's dtype, such as "fp8_ds_mla", or an `index_format` of its index keys, "fp8", the
    model takes a `PagedCache` alone, which holds it.
    Caches, generation and all other layers stay those of
    `transformers`. Raises `UnsupportedModel`, before anything is changed, for a model that cannot be served,
    and `BackendError` for a backend that is not there.
    """
    surveyed = survey(model)
    opened = backend if isinstance(backend, Backend) else _load(backend, surveyed.device, arguments)
    if opened is backend and arguments:
        raise UnsupportedModel(f"{', '.join(arguments)}: such arguments go to `mla.load_backend`.")
    if index_format and not surveyed.config.index_n_heads:
        raise UnsupportedModel("this model has no indexer, and so no index keys: leave index_format out.")
    if opened.device is None or not _same(opened.device, surveyed.device):
        name = getattr(backend, "name", backend)
        raise UnsupportedModel(
            f"this model is on {surveyed.device}, and backend '{name}' computes on {opened.device}: move it "
            "there with `model.to(...)` first."
        )
    _register()
    steps = Steps(surveyed.dtype, surveyed.device, WORKSPACE_BYTES, Turn.of(opened))
    use = _use(surveyed)
    try:
        for layer in surveyed.layers:
            _prepare(layer, surveyed, opened, steps, cache_format, index_format)
            layer.mla_use = use
        surveyed.owner.set_attn_implementation(NAME)
        for served, guards in zip(surveyed.models, use.guards.values(), strict=True):
            guards.append(guard(served, surveyed.dtype, surveyed.device))
        check = surveyed.models[-1].register_forward_pre_hook(Check(surveyed), with_kwargs=True)
        use.guards[use.models[-1]].append(check.remove)
    except BaseException:
        _undo(use)
        raise
    return model


def _load(name: str, device: torch.device, arguments: dict[str, Any]) -> Backend:
    """Load a backend for the model's device."""
    if device.index is not None:
        arguments = {"index": device.index, **arguments}
    return mla.load_backend(name, **arguments)


def _use(surveyed: Survey) -> Use:
    models = [weakref.ref(model) for model in surveyed.models]
    return Use(
        [weakref.ref(layer) for layer in surveyed.layers],
        models[surveyed.models.index(surveyed.owner) :],
        surveyed.owner.config._attn_implementation,
        {model: [] for model in models},
    )


def _same(backend: torch.device, model: torch.device) -> bool:
    """Return whether these are one device; the host has no index."""
    return backend.type == model.type and (model.index or 0) == (backend.index or 0)


def _prepare(
    layer: Any,
    surveyed: Survey,
    backend: Backend,
    steps: Steps,
    cache_format: str | None,
    index_format: str | None,
) -> None:
    """Have one layer run our ops; packed weights take the place of its plain ones."""
    config = surveyed.config.of_layer(layer.layer_idx)
    core = AttentionCore(
        config,
        backend=backend,
        dtype=surveyed.dtype,
        scratch=steps.scratch,
        cache_format=cache_format,
        index_format=index_format,
    )
    core.load(layer.kv_b_proj.weight)
    layer.mla_attention, layer.expand_kv = Attention(core, steps, surveyed.config), _as_they_are
    if config.index_n_heads:
        layer.indexer.forward = Indexing(layer.indexer, config)
    layer.kv_b_proj = PackedKvB(layer.kv_b_proj, core)
    roles = [role for role in ("latent_attention", "sparse_latent_attention") if role in core.ops]
    steps.zeroes = not all(core.ops[role].op.nan_safe_tail for role in roles)
    for name in PROJECTIONS:
        if isinstance(linear := getattr(layer, name, None), nn.Linear):  # which kv_b_proj is no more
            setattr(layer, name, PackedLinear(linear, backend.ops(), "auto", steps.scratch.turn))


def restore(model: Any) -> Any:
    """Undo `use_mla`, bit for bit, on the model, the one it is a part of, or those inside it; return it.

    Raises `UnsupportedModel` where there is nothing to undo.
    """
    uses = {id(layer.mla_use): layer.mla_use for layer in find_attention(model) if hasattr(layer, "mla_use")}
    if not uses:
        raise UnsupportedModel("this model does not run our ops: there is nothing to restore.")
    for use in uses.values():
        _undo(use)
    return model


def _undo(use: Use) -> None:
    """Give back what layers had; some may not have been prepared."""
    for model, guards in use.guards.items():
        for take_away in guards if model() is not None else ():
            take_away()
    for layer in filter(None, (layer() for layer in use.layers)):
        for name, child in list(layer.named_children()):
            if isinstance(child, Packed):
                setattr(layer, name, child.plain())
        for name in ("mla_use", "mla_attention", "expand_kv"):
            vars(layer).pop(name, None)
        if isinstance(indexer := getattr(layer, "indexer", None), nn.Module):
            vars(indexer).pop("forward", None)
    if owner := next(filter(None, (model() for model in use.models)), None):
        owner.set_attn_implementation(use.before)


def _as_they_are(latent: torch.Tensor, pe: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the attention function the latents, in the place of keys and values."""
    return latent, pe


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, visible_keys)
