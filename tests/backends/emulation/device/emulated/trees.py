"""Walking over arguments: torch's own pytree is general, and slower than the operations it would wrap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Most arguments: told by their type at once.
LEAVES = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout})


def tensors(*values: Any) -> list[torch.Tensor]:
    """Return the tensors among values, which may be nested in lists, tuples and dicts."""
    leaves: list[torch.Tensor] = []
    for value in values:
        kind = type(value)
        if kind in LEAVES:
            continue
        if kind is torch.Tensor or isinstance(value, torch.Tensor):
            leaves.append(value)
        elif isinstance(value, (list, tuple)):
            leaves += tensors(*value)
        elif isinstance(value, dict):
            leaves += tensors(*value.values())
    return leaves


def change(value: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """Return `value` with `function` applied to every tensor in it."""
    if type(value) in LEAVES:
        return value
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(change(item, function) for item in value)
    if isinstance(value, dict):
        return {key: change(item, function) for key, item in value.items()}
    return value
