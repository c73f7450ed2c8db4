"""What a compiled model calls as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable[..., object])


def uncompiled(function: F) -> F:
    """Keep `torch.compile` out of a function: steps are worked out on the host, and ops are a backend's."""
    disabled: F = torch.compiler.disable(function)
    return disabled
