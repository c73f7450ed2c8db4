"""Methods of a model in use that refuse before anything is changed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from mla.integrations.transformers.errors import UnsupportedModel
from mla.integrations.transformers.packed import refuse_to_load, require_unmoved


def guard(model: Any, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Have methods refuse what packed weights would, but after others were changed; return the undo."""
    guards = {"_apply": _unmoved(model._apply, dtype, device), "_load_from_state_dict": refuse_to_load}
    if hasattr(model, "generate"):
        guards["generate"] = _without_mtp(model.generate, model)
    own = {name: vars(model)[name] for name in guards if name in vars(model)}
    vars(model).update(guards)

    def undo() -> None:
        for name in guards:
            vars(model).pop(name, None)
        vars(model).update(own)

    return undo


def _unmoved(apply: Callable[..., Any], dtype: torch.dtype, device: torch.device) -> Callable[..., Any]:
    """Return an `nn.Module._apply` that lets only those moves pass that leave packed weights as they are."""
    weight = torch.empty(0, dtype=dtype, device=device)

    def moved(change: Any, *arguments: Any, **words: Any) -> Any:
        require_unmoved(change, weight)
        return apply(change, *arguments, **words)

    return moved


def _without_mtp(generate: Callable[..., Any], model: Any) -> Callable[..., Any]:
    """Return a `generate` that refuses guesses by layers that are made, unprepared, while it runs."""

    @functools.wraps(generate)
    def generated(*arguments: Any, **words: Any) -> Any:
        given = [*arguments[1:2], words.get("generation_config"), getattr(model, "generation_config", None)]
        config = next((one for one in given if one is not None), None)
        if words.get("use_mtp", getattr(config, "use_mtp", None)):
            raise UnsupportedModel(
                "the layers that guess tokens for `use_mtp` do not run our ops: leave it out, or call "
                "`restore(model)` before."
            )
        return generate(*arguments, **words)

    return generated
