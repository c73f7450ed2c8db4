"""Modules in the place of a layer's `nn.Linear`, with the weight as our ops packed it and no second copy."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from mla.integrations.transformers.errors import UnsupportedModel, require_inference, uncompiled
from mla.layer.forward import AttentionCore
from mla.layer.ops import Choice, choose
from mla.layer.workspace import Turn
from mla_backends.api import FusedOp, LinearSpec


def require_unmoved(change: Callable[[torch.Tensor], torch.Tensor], weight: torch.Tensor) -> None:
    """Raise `UnsupportedModel` unless `change` leaves a weight like this empty one as it is."""
    if change(weight) is not weight:
        raise UnsupportedModel(
            "a model that runs our ops cannot be moved or cast, since its weights are packed for one device: "
            "call `restore(model)`, move it, and then `use_mla` again."
        )


def refuse_to_load(*arguments: Any, **words: Any) -> NoReturn:
    """Raise `UnsupportedModel`."""
    raise UnsupportedModel("this model's weights are packed: call `restore(model)` to load others.")


class Packed(nn.Module):
    """A packed weight.

    `weight` is the plain module's own, emptied: optimizers and `requires_grad_` find it, and copying a whole
    weight to it by name fails for its shape. The state dict has it as it was loaded.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.training = linear.training
        self._linear = (linear,)  # in a tuple, so that it is not a child
        self.weight, self.bias = linear.weight, linear.bias

    @property
    def trains(self) -> bool:
        """Whether a parameter wants gradients."""
        return any(weight.requires_grad for weight in self.parameters(recurse=False))

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

    def _apply(self, fn: Any, recurse: bool = True) -> Packed:
        require_unmoved(fn, self.weight.detach())
        return super()._apply(fn, recurse)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedModel(
            "a model that runs our ops cannot be copied or pickled, since its weights are packed: call "
            "`restore(model)` before, or save its `state_dict()`."
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight_as_loaded()

    def _load_from_state_dict(self, *arguments: Any) -> None:
        refuse_to_load()


class PackedLinear(Packed):
    """An `nn.Linear` run by one of our ops."""

    def __init__(
        self, linear: nn.Linear, offered: Mapping[str, FusedOp], policy: str, turn: Turn | None = None
    ) -> None:
        """`policy` is the `ops` of `mla.MLA`, and `turn` that of the backend which offers them."""
        super().__init__(linear)
        weight = linear.weight.detach()
        spec = LinearSpec(linear.in_features, linear.out_features, 1, weight.dtype, weight.device)
        self._choice: Choice = choose("linear", spec, offered, policy)
        self._turn = turn or Turn()
        with self._turn:
            self._packed = self._choice.op.pack(weight)
        self.take_weight()

    @uncompiled
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [..., i] times the weight, plus the bias: [..., o]."""
        require_inference(x, training=torch.is_grad_enabled() and self.trains)
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


# ------------------------------------------------------------------------------------------- guards
# Methods of a model in use that refuse before anything is changed.

Method = Callable[..., Any]
GUESSES = "_get_candidate_generator"  # which `generate` asks with all settings, before it runs the model


def guard(model: Any, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Have methods refuse what packed weights would, but after others were changed; return the undo.

    All are called by other methods of the model. Neither they nor the undo keep it alive: it would have to
    wait for Python's garbage collector, which counts no bytes.
    """
    guards: dict[str, Method] = {
        "_apply": _unmoved(_method(model, "_apply"), dtype, device),
        "_load_from_state_dict": refuse_to_load,
    }
    if hasattr(model, GUESSES):
        guards[GUESSES] = _without_mtp(_method(model, GUESSES))
    before = {name: vars(model)[name] for name in guards if name in vars(model)}
    vars(model).update(guards)
    alive = weakref.ref(model)

    def undo() -> None:
        held = vars(alive())
        for name in guards:
            held.pop(name, None)
        held.update(before)

    return undo


def _method(model: Any, name: str) -> Callable[[], Method]:
    """Return how to get a method as it is now: the class's without keeping the model, or one of its own."""
    if name in vars(model):
        method: Method = vars(model)[name]
        return lambda: method
    bound: Any = weakref.WeakMethod(getattr(model, name))
    return lambda: bound()


def _unmoved(apply: Callable[[], Method], dtype: torch.dtype, device: torch.device) -> Method:
    """Return an `nn.Module._apply` that lets only those moves pass that leave packed weights as they are."""
    weight = torch.empty(0, dtype=dtype, device=device)

    def moved(change: Any, *arguments: Any, **words: Any) -> Any:
        require_unmoved(change, weight)
        return apply()(change, *arguments, **words)

    return moved


def _without_mtp(choose: Callable[[], Method]) -> Method:
    """Return a choice of who guesses tokens that refuses layers which are made, unprepared, for that."""

    def chosen(*arguments: Any, **words: Any) -> Any:
        config = words.get("generation_config", next(iter(arguments), None))
        if getattr(config, "use_mtp", None):
            raise UnsupportedModel(
                "the layers that guess tokens for `use_mtp` do not run our ops: leave it out, or call "
                "`restore(model)` before."
            )
        return choose()(*arguments, **words)

    return chosen
