"""How far apart rows and pages can be laid in the memory that is there, and memory for them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from mla.cases.memory import Pages
from mla.conformance.trial import Refused, Trial
from mla_backends import host
from mla_backends.errors import describe, out_of_memory

# Numbers from the first to the last: beyond what 32 bits count, unsigned and signed. Beyond the last, signed
# bytes have run out, in a dtype of two.
PLACES = (1 << 32, 1 << 31, 1 << 30)


def reach(trial: Trial, tensors: int = 1) -> int:
    """Return the farthest place that so many tensors have memory for. Raises `Refused` if there is none.

    Several tensors are laid within what signed numbers of 32 bits no longer count: farther takes too much.
    """
    least = 0
    for numbers in PLACES if tensors == 1 else PLACES[1:] or PLACES:
        least = numbers * trial.dtype.itemsize * tensors
        # Little of a tensor on the host is ever touched, unless an op makes a copy of a cache in float32.
        copied = 4 * numbers if tensors == 1 else 0
        needed, free = (
            (least + copied, host.memory_available())
            if trial.device.type == "cpu"
            else (least + least // 4, trial.backend.memory().free)
        )
        if free is None:
            raise Refused("how much memory is free is not known")
        if needed <= free:
            return numbers
    raise Refused(f"there is no room for {least / 1e9:.2g} GB")


@contextmanager
def memory_may_end() -> Iterator[None]:
    """Raise `Refused` for an error that says that memory was short, as copies may cause."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is one, where torch has it
        if out_of_memory(describe(error)):
            raise Refused("there is not as much memory as it takes") from error
        raise


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return memory that nobody has written to. Raises `Refused` if there is not as much."""
    try:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    except (RuntimeError, MemoryError) as error:
        gigabytes = math.prod(shape) * dtype.itemsize / 1e9
        raise Refused(f"{gigabytes:.2g} GB could not be allocated") from error


def scattered(tensor: torch.Tensor, device: torch.device, apart: int) -> torch.Tensor:
    """Copy the rows of [n, h, d] to the device, so many numbers apart. What is between them is never touched.

    Raises `Refused` if that takes more memory than there is.
    """
    whole = allocate((tensor.shape[0] * apart,), tensor.dtype, device)
    part = whole.as_strided(tensor.shape, (apart, tensor.shape[2], 1))
    for row, values in zip(part, tensor, strict=True):  # an index could be too narrow, too
        row.copy_(values)
    return part


def hardly_touched(pages: Pages, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a cache of keys [K, w], nothing else of it written. Raises `Refused` if it is too large."""
    blocks = pages.blocks(rows)
    cache = allocate((pages.count, *blocks.shape[1:]), blocks.dtype, device)
    for page, block in zip(pages.order.tolist(), blocks, strict=True):  # an index could be too narrow, too
        cache[page].copy_(block)
    return cache
