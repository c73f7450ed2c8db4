"""Why a tensor cannot be given to code that reads its memory, and not its values.

Our entry points and compiled kernels ask before they take an address: `data_ptr()` of a lazily negated,
sparse, fake or wrapped tensor does not lead to its values. Importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_plain: tuple[Any, ...] = ()  # torch.Tensor and torch.nn.Parameter, once they are here
_strided: Any = None


def misfit(x: Any, shape: Sequence[int | None], dtype: torch.dtype, device: torch.device) -> str:
    """Return why x is no plain tensor of this shape (None: any size) and dtype on `device`, "" if it is.

    The sentence goes on from the name of x, as in f"{name} {misfit(...)}". Strides may be any: callers that
    need more ask for it themselves. A meta tensor is on another device; a nested one has no sizes to compare.
    """
    try:
        if (  # what nearly all are: it is asked in every step
            type(x) in _plain
            and _matches(x.shape, shape)
            and x.dtype is dtype
            and x.device == device
            and x.layout is _strided
            and not x.is_neg()
        ):
            return ""
        return _why(x, shape, dtype, device)
    except RuntimeError as error:  # a nested tensor has no sizes
        return f"is not a plain tensor ({str(error).splitlines()[0]})."


def _matches(actual: Sequence[int], shape: Sequence[int | None]) -> bool:
    if actual == shape:
        return True
    if len(actual) != len(shape):
        return False
    for size, wanted in zip(actual, shape):  # noqa: B905, SIM110  # in every step: `strict` and `all` cost time
        if wanted is not None and size != wanted:
            return False
    return True


def _same(actual: torch.device, wanted: torch.device) -> bool:
    """Return whether these are one device; the first of its kind may go without an index."""
    return actual.type == wanted.type and (actual.index or 0) == (wanted.index or 0)


def _why(x: Any, shape: Sequence[int | None], dtype: torch.dtype, device: torch.device) -> str:
    import torch

    global _plain, _strided
    _plain, _strided = (torch.Tensor, torch.nn.Parameter), torch.strided  # importing this module imports none
    wanted = f"must be [{', '.join('any' if size is None else str(size) for size in shape)}] {dtype}"
    if not isinstance(x, torch.Tensor):
        return f"{wanted}, got a {type(x).__name__}."
    # A vendor's stack may have a class of its own; the host has none.
    of_a_vendor = x.device.type != "cpu" and type(x).__module__.partition(".")[0] != "torch"
    if type(x) not in _plain and not of_a_vendor:
        return (
            f"is a {type(x).__name__}, and must be a plain tensor: leave such wrappers and their modes out."
        )
    if not _matches(x.shape, shape) or x.dtype != dtype:
        return f"{wanted}, got {list(x.shape)} {x.dtype}."
    if not _same(x.device, device):
        return f"must be on {device}, and is on {x.device}."
    if x.layout != torch.strided:
        return f"must be a dense tensor, and is {x.layout}."
    return "is negated lazily: pass x.resolve_neg()." if x.is_neg() else ""
