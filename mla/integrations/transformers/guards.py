"""Methods of a model in use that refuse before anything is changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from mla.integrations.transformers.errors import UnsupportedModel
from mla.integrations.transformers.packed import refuse_to_load, require_unmoved

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
