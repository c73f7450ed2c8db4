"""Methods of a model in use that refuse before anything is changed."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch

from mla.integrations.transformers.errors import UnsupportedModel
from mla.integrations.transformers.packed import refuse_to_load, require_unmoved

Method = Callable[..., Any]


def guard(model: Any, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Have methods refuse what packed weights would, but after others were changed; return the undo.

    Neither keeps the model alive: it would have to wait for Python's garbage collector, which counts no
    bytes.
    """
    guards: dict[str, Method] = {
        "_apply": _unmoved(_method(model, "_apply"), dtype, device),
        "_load_from_state_dict": refuse_to_load,
    }
    if hasattr(model, "generate"):
        guards["generate"] = _without_mtp(_method(model, "generate"), weakref.ref(model))
    own = {name: vars(model)[name] for name in guards if name in vars(model)}
    vars(model).update(guards)
    alive = weakref.ref(model)

    def undo() -> None:
        held = vars(alive())
        for name in guards:
            held.pop(name, None)
        held.update(own)

    return undo


def _method(model: Any, name: str) -> Callable[[], Method]:
    """Return how to get a method as it is now: the class's without keeping the model, or one of its own."""
    if name in vars(model):
        own: Method = vars(model)[name]
        return lambda: own
    found: Any = weakref.WeakMethod(getattr(model, name))
    return lambda: found()


def _unmoved(apply: Callable[[], Method], dtype: torch.dtype, device: torch.device) -> Method:
    """Return an `nn.Module._apply` that lets only those moves pass that leave packed weights as they are."""
    weight = torch.empty(0, dtype=dtype, device=device)

    def moved(change: Any, *arguments: Any, **words: Any) -> Any:
        require_unmoved(change, weight)
        return apply()(change, *arguments, **words)

    return moved


def _without_mtp(generate: Callable[[], Method], model: Callable[[], Any]) -> Method:
    """Return a `generate` that refuses guesses by layers that are made, unprepared, while it runs."""

    def generated(*arguments: Any, **words: Any) -> Any:
        own = getattr(model(), "generation_config", None)
        configs = (
            *arguments[1:2],
            words.get("generation_config"),
            own,
        )  # the next one says what one leaves open
        asked = (words.get("use_mtp"), *(getattr(config, "use_mtp", None) for config in configs))
        if next((one for one in asked if one is not None), False):
            raise UnsupportedModel(
                "the layers that guess tokens for `use_mtp` do not run our ops: leave it out, or call "
                "`restore(model)` before."
            )
        return generate()(*arguments, **words)

    stock = generate()
    functools.update_wrapper(generated, stock)
    vars(generated)["__signature__"] = inspect.signature(stock)
    del vars(generated)["__wrapped__"]  # it keeps the model
    return generated
