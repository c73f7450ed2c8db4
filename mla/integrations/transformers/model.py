"""`use_mla` and `restore`: switch a loaded model's attention layers to our ops, and back.

Modules with packed weights, and no second copy, take the place of a layer's `nn.Linear`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

import mla
from mla.cache.formats import stored_index_format
from mla.integrations.transformers.admission import (
    NAME,
    PROJECTIONS,
    Check,
    Survey,
    UnsupportedModel,
    find_attention,
    leave_alone,
    require_inference,
    survey,
    uncompiled,
    visible_keys,
)
from mla.integrations.transformers.attention import Attention, Indexing, Steps, attend
from mla.layer.forward import AttentionCore
from mla.layer.ops import Choice, choose
from mla.layer.workspace import Turn
from mla_backends.api import Backend, FusedOp, LinearSpec


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
    other than the model's dtype, such as "fp8_ds_mla", or the `index_format` "fp8" of its index keys, the
    model takes a `PagedCache` alone, which holds it.
    Caches, generation and all other layers stay those of
    `transformers`. Raises `UnsupportedModel`, before anything is changed, for a model that cannot be served,
    and `BackendError` for a backend that is not there.
    """
    surveyed = survey(model)
    device = surveyed.device
    if isinstance(backend, Backend) and arguments:
        raise UnsupportedModel(f"this backend is open: give {', '.join(arguments)} to `mla.load_backend`.")
    if device.index is not None:
        arguments = {"index": device.index, **arguments}
    opened = backend if isinstance(backend, Backend) else mla.load_backend(backend, **arguments)
    if stored_index_format(index_format) and not surveyed.config.index_n_heads:
        raise UnsupportedModel("this model has no indexer, and so no index keys: leave index_format out.")
    there = opened.device
    if there is None or (there.type, there.index or 0) != (device.type, device.index or 0):
        name = getattr(backend, "name", backend)
        raise UnsupportedModel(
            f"this model is on {device}, and backend '{name}' computes on {there}: move it "
            "there with `model.to(...)` first."
        )
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, visible_keys)
    steps = Steps(surveyed.dtype, device, Turn.of(opened))
    outer, owner, inner = surveyed.models[0], surveyed.owner, surveyed.models[-1]
    outer.mla_used, owner.mla_before = True, owner.config._attn_implementation
    try:
        for layer in surveyed.layers:
            _prepare(layer, surveyed, opened, steps, cache_format, index_format)
        owner.set_attn_implementation(NAME)
        for served in surveyed.models:  # a guard comes first, as methods go through children in their order
            guard = Guard(torch.empty(0, dtype=surveyed.dtype, device=device))
            served._modules = {"mla_guard": guard, **served._modules}
        check = Check(surveyed)
        inner.mla_check = inner.register_forward_pre_hook(check, with_kwargs=True)
        for served in surveyed.models:
            check.watch(served, inner)
    except BaseException:
        restore(model)
        raise
    return model


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
    layer.mla_attention = Attention(core, steps, surveyed.config)
    layer.expand_kv = lambda latent, pe: (latent, pe)  # the latents, in the place of keys and values
    if config.index_n_heads:
        layer.indexer.forward = Indexing(layer.indexer, config)
    layer.kv_b_proj = PackedKvB(layer.kv_b_proj, core)
    roles = [role for role in ("latent_attention", "sparse_latent_attention") if role in core.ops]
    steps.zeroes = not all(core.ops[role].op.nan_safe_tail for role in roles)
    for name in PROJECTIONS:
        if isinstance(linear := getattr(layer, name, None), nn.Linear):  # which kv_b_proj is no more
            setattr(layer, name, PackedLinear(linear, backend.ops(), steps.scratch.turn))


def restore(model: Any) -> Any:
    """Undo `use_mla`, bit for bit, on the model that it was given, or what holds that; return it.

    Raises `UnsupportedModel` where there is nothing to undo.
    """
    parts: list[Any] = list(model.modules()) if isinstance(model, nn.Module) else []
    used = [vars(part).pop("mla_used", False) for part in parts]
    if not any(used):
        raise UnsupportedModel(
            "`use_mla` was given neither this model nor a part of it: there is nothing to restore."
        )
    for part in parts:
        part._modules.pop("mla_guard", None)
        for name, child in list(part.named_children()):
            if isinstance(child, Packed):
                setattr(part, name, child.plain())
    for layer in find_attention(model):
        for name in ("mla_attention", "expand_kv"):
            vars(layer).pop(name, None)
        if isinstance(indexer := getattr(layer, "indexer", None), nn.Module):
            vars(indexer).pop("forward", None)
    for part in parts:
        leave_alone(part)
        if "mla_check" in vars(part):
            vars(part).pop("mla_check").remove()
        if "mla_before" in vars(part):
            part.set_attn_implementation(vars(part).pop("mla_before"))
    return model


# ----------------------------------------------------------------------------------------------------- packed
class Guard(nn.Module):
    """Refuses what packed weights cannot follow; as a model's first child, before others are changed."""

    def __init__(self, like: torch.Tensor) -> None:
        """`like`: an empty tensor of the packed weights' dtype and device."""
        super().__init__()
        self._like = like

    def _apply(self, fn: Any, recurse: bool = True) -> Guard:
        if fn(self._like) is not self._like:
            raise UnsupportedModel(
                "a model that runs our ops cannot be moved or cast, since its weights are packed for one "
                "device: call `restore(model)`, move it, and then `use_mla` again."
            )
        return super()._apply(fn, recurse)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedModel(
            "a model that runs our ops cannot be copied or pickled, since its weights are packed: call "
            "`restore(model)` before, or save its `state_dict()`."
        )

    def _load_from_state_dict(self, *arguments: Any) -> None:
        raise UnsupportedModel("this model's weights are packed: call `restore(model)` to load others.")


class Packed(Guard):
    """A packed weight.

    `weight` is the plain module's own, emptied: optimizers and `requires_grad_` find it, and copying a whole
    weight to it by name fails for its shape. The state dict has it as it was loaded.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.weight.detach().new_empty(0))
        self.training = linear.training
        self._linear = (linear,)  # in a tuple, so that it is not a child
        self.weight, self.bias = linear.weight, linear.bias

    def take_weight(self) -> None:
        """Free the plain weight, when nothing can fail any more."""
        with torch.inference_mode(False):  # what is made in that mode cannot be trained later
            self.weight.data = self.weight.data.new_empty(0)

    def weight_as_loaded(self) -> torch.Tensor:
        """Return the weight [o, i], bit for bit."""
        raise NotImplementedError

    def plain(self) -> nn.Linear:
        """Return the module that this one stands in for, and give it its weight."""
        (linear,) = self._linear
        with torch.inference_mode(False):
            linear.weight.data = self.weight_as_loaded()  # even if it was replaced in between
        return linear.train(self.training)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight_as_loaded()


class PackedLinear(Packed):
    """An `nn.Linear` run by one of our ops."""

    def __init__(self, linear: nn.Linear, offered: Mapping[str, FusedOp], turn: Turn) -> None:
        """`turn`: that of the backend whose ops are `offered`."""
        super().__init__(linear)
        weight = linear.weight.detach()
        spec = LinearSpec(linear.in_features, linear.out_features, 1, weight.dtype, weight.device)
        self._choice: Choice = choose("linear", spec, offered, "auto")
        self._turn = turn
        with self._turn:
            self._packed = self._choice.op.pack(weight)
        self.take_weight()

    @uncompiled
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [..., i] times the weight, plus the bias: [..., o]."""
        require_inference(x, *(self.parameters(recurse=False) if torch.is_grad_enabled() else ()))
        spec = self._choice.spec
        for operand in (x, x if self.bias is None else self.bias):
            if (operand.dtype, operand.device) != (spec.dtype, spec.device):
                raise UnsupportedModel(
                    f"weights of this model are packed in {spec.dtype} on {spec.device}, and get "
                    f"{operand.dtype} on {operand.device}: leave autocast out, and `restore(model)` before "
                    "it is moved."
                )
        rows = x.reshape(-1, spec.in_features)
        out = rows.new_empty(rows.shape[0], spec.out_features)
        with self._turn:
            self._choice.op(self._packed, x=rows, bias=self.bias, out=out)
        return out.view(*x.shape[:-1], spec.out_features)

    def weight_as_loaded(self) -> torch.Tensor:
        """Return the weight [o, i], bit for bit."""
        with self._turn:
            return self._choice.op.unpack(self._packed).clone()


class PackedKvB(Packed):
    """`kv_b_proj`, absorbed into the attention."""

    def __init__(self, linear: nn.Linear, core: AttentionCore) -> None:
        super().__init__(linear)
        self._core = core
        self.take_weight()

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """Raise `UnsupportedModel`: nothing is expanded any more."""
        raise UnsupportedModel("this model's kv_b_proj is packed for our ops: call `restore(model)` first.")

    def weight_as_loaded(self) -> torch.Tensor:
        """Return the weight [h (n + v), c], bit for bit."""
        return self._core.kv_b_proj()
