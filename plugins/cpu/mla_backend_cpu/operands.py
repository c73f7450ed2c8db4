"""What the kernels take: plain tensors with memory, of the right shape, asked before an address is taken."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from mla_backends.api.operands import misfit

if TYPE_CHECKING:
    import torch


def operand(name: str, x: Any, dtype: torch.dtype, *shape: int | None) -> torch.Tensor:
    """Return x. Raises ValueError unless it is a plain host tensor of this dtype and shape (None: any)."""
    return _checked(name, x, dtype, shape)


def rows(name: str, x: Any, dtype: torch.dtype, *shape: int | None) -> torch.Tensor:
    """Return x as the kernels read it. It may be a copy: bind it to a name, so that it outlives the call."""
    return _direct(name, _checked(name, x, dtype, shape))


def written(name: str, x: Any, dtype: torch.dtype, *shape: int | None) -> torch.Tensor:
    """Return x, which is written. Raises ValueError if its elements share memory, as expanded ones do."""
    return _distinct(name, _checked(name, x, dtype, shape))


def output(name: str, x: Any, dtype: torch.dtype, *shape: int | None) -> torch.Tensor:
    """Return where the kernels write x: x itself, or a copy for the caller to copy back."""
    return _direct(name, _distinct(name, _checked(name, x, dtype, shape)))


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


def _checked(name: str, x: Any, dtype: torch.dtype, shape: tuple[int | None, ...]) -> torch.Tensor:
    if wrong := misfit(x, shape, dtype, _host()) or _lost(x):
        raise ValueError(f"{name} {wrong}")
    return x


def _distinct(name: str, x: torch.Tensor) -> torch.Tensor:
    if x.is_contiguous():
        return x
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            raise ValueError(f"{name} has strides {list(x.stride())}, so several elements share memory.")
        reach += (size - 1) * stride
    return x


def _direct(name: str, x: torch.Tensor) -> torch.Tensor:
    return x if is_direct(x) else operand(name, x.contiguous(), x.dtype, *x.shape)  # which a mode may fake


def span(x: torch.Tensor) -> int:
    """Return how many elements of its storage x reaches over."""
    if x.is_contiguous() or not x.numel():
        return x.numel()
    reach = 1
    for size, stride in zip(x.shape, x.stride()):  # noqa: B905  # `strict` costs time
        reach += (size - 1) * stride
    return reach


@functools.cache
def _host() -> torch.device:
    import torch

    return torch.device("cpu")


def _lost(x: torch.Tensor) -> str:
    """Return why x has no memory, or less than its shape says; "" if it has."""
    try:
        spare = x.untyped_storage().nbytes() - x.storage_offset() * x.itemsize
        used = x.nbytes if x.is_contiguous() else span(x) * x.itemsize
    except RuntimeError:
        return "has no memory of its own, as inside vmap and other transforms: pass a plain tensor."
    if used and (used > spare or not x.data_ptr()):
        return "has lost its memory: its storage was resized."
    return ""
