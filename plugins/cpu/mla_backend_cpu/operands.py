"""What the kernels take: plain tensors with memory, of the right shape, asked before an address is taken."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from mla_backends.api.operands import misfit

if TYPE_CHECKING:
    import torch


def operand(name: str, x: Any, dtype: torch.dtype, *shape: int | None) -> torch.Tensor:
    """Return x. Raises ValueError unless it is a plain host tensor of this dtype and shape (None: any)."""
    if wrong := misfit(x, shape, dtype, _host()) or _lost(x):
        raise ValueError(f"{name} {wrong}")
    return x


def rows(name: str, x: Any, dtype: torch.dtype, *shape: int | None) -> torch.Tensor:
    """Return x as the kernels read it. It may be a copy: bind it to a name, so that it outlives the call."""
    return _direct(name, operand(name, x, dtype, *shape))


def written(name: str, x: Any, dtype: torch.dtype, *shape: int | None) -> torch.Tensor:
    """Return x, which is written. Raises ValueError if its elements share memory, as expanded ones do."""
    checked = operand(name, x, dtype, *shape)
    reach = 0
    for stride, size in () if checked.is_contiguous() else sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            raise ValueError(f"{name} has strides {list(x.stride())}, so several elements share memory.")
        reach += (size - 1) * stride
    return checked


def output(name: str, x: Any, dtype: torch.dtype, *shape: int | None) -> torch.Tensor:
    """Return where the kernels write x: x itself, or a copy for the caller to copy back."""
    return _direct(name, written(name, x, dtype, *shape))


def pages(cache: Any, width: int) -> torch.Tensor:
    """Return the cache [pages, page, width]. Raises ValueError unless it is contiguous, with slots."""
    import torch

    operand("cache", cache, torch.bfloat16, None, None, width)
    if not cache.is_contiguous():
        raise ValueError("the native ops need a cache with contiguous pages; this one is strided.")
    if not cache.shape[1]:
        raise ValueError("cache has pages without a slot.")
    return cache


def is_direct(x: torch.Tensor) -> bool:
    """Return whether elements of the last dimension are adjacent: the kernels read them as vectors."""
    return x.stride(-1) == 1 or x.shape[-1] == 1


def _direct(name: str, x: torch.Tensor) -> torch.Tensor:
    return x if is_direct(x) else operand(name, x.contiguous(), x.dtype, *x.shape)  # which a mode may fake


def span(x: torch.Tensor) -> int:
    """Return how many elements of its storage x reaches over."""
    if x.is_contiguous() or not x.numel():
        return x.numel()
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


@functools.cache
def _host() -> torch.device:
    import torch

    return torch.device("cpu")


def _lost(x: torch.Tensor) -> str:
    """Return why x has no memory, or less than its shape says; "" if it has."""
    try:
        nbytes, count = x.untyped_storage().nbytes(), span(x)
    except RuntimeError:
        return "has no memory of its own, as inside vmap and other transforms: pass a plain tensor."
    if count and (not x.data_ptr() or (x.storage_offset() + count) * x.element_size() > nbytes):
        return "has lost its memory: its storage was resized."
    return ""
