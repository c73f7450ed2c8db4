"""`misfit`: why a tensor is not what code that reads its memory, and not its values, may be given."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def misfit(x: Any, shape: Sequence[int | None], dtype: torch.dtype, device: torch.device) -> str:
    """Return why x is no plain tensor of this shape (None: any size) and dtype on `device`, "" if it is.

    The sentence goes on from the name of x, as in f"{name} {misfit(...)}". What is lazy, sparse, fake or
    wrapped has other values than its memory, or no memory at all.
    """
    kinds, strided = _plain()
    try:
        if (
            type(x) in kinds
            and (x.shape == shape or _matches(x.shape, shape))
            and x.dtype == dtype
            and (x.device == device or _same(x.device, device))
            and x.layout == strided
            and not x.is_neg()
        ):
            return ""
        return _why(x, shape, dtype, device)
    except RuntimeError as error:  # a nested tensor has no sizes
        return f"is no plain tensor ({str(error).splitlines()[0]})."


@functools.cache
def _plain() -> tuple[tuple[Any, ...], torch.layout]:
    import torch

    return (torch.Tensor, torch.nn.Parameter), torch.strided


def _matches(found: Sequence[int], shape: Sequence[int | None]) -> bool:
    sizes = zip(found, shape, strict=False)
    return len(found) == len(shape) and all(wanted in (size, None) for size, wanted in sizes)


def _same(found: torch.device, wanted: torch.device) -> bool:
    """Return whether these are one device; the first of its kind may go without an index."""
    return found.type == wanted.type and (found.index or 0) == (wanted.index or 0)


def _why(x: Any, shape: Sequence[int | None], dtype: torch.dtype, device: torch.device) -> str:
    kinds, strided = _plain()
    wanted = f"must be [{', '.join('any' if size is None else str(size) for size in shape)}] {dtype}"
    if not isinstance(x, kinds[0]):
        return f"{wanted}, got a {type(x).__name__}."
    if type(x) not in kinds:
        return (
            f"is a {type(x).__name__}, and must be a plain tensor: leave such wrappers and their modes out."
        )
    if not _matches(x.shape, shape) or x.dtype != dtype:
        return f"{wanted}, got {list(x.shape)} {x.dtype}."
    if not _same(x.device, device):
        return f"must be on {device}, and is on {x.device}."
    if x.layout != strided:
        return f"must be a dense tensor, and is {x.layout}."
    return "is negated lazily: pass x.resolve_neg()."
