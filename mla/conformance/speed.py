"""Which dtypes a device is slow in: those that take much longer than wider numbers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch

from mla.conformance.report import Slow
from mla.text import dtype_name
from mla_backends.api import Backend
from mla_backends.errors import plugin_code

# A product [ROWS, WIDTH] x [WIDTH, WIDTH] that takes this many times as long as in a wider dtype is slow.
FACTOR = 3.0
ROWS, WIDTH = 64, 1024
ATTEMPTS = 5
PATIENCE = 0.5  # seconds after which a dtype has been tried often enough


def slow_dtypes(backend: Backend, dtypes: tuple[torch.dtype, ...]) -> tuple[Slow, ...]:
    """Return the dtypes that the backend's device is slow in, of those given."""
    if len(dtypes) < 2 or backend.device is None:
        return ()
    taken = {dtype: _seconds(backend, dtype) for dtype in dtypes}
    return tuple(found for dtype in dtypes if (found := _judged(dtype, taken)) is not None)


def _judged(dtype: torch.dtype, taken: Mapping[torch.dtype, float | None]) -> Slow | None:
    own = taken[dtype]
    known = {other: seconds for other, seconds in taken.items() if seconds is not None}
    wider = {other: seconds for other, seconds in known.items() if other.itemsize > dtype.itemsize}
    if own is None or not wider:
        return None
    than = min(wider, key=wider.__getitem__)
    factor = own / wider[than]
    return Slow(dtype=dtype_name(dtype), than=dtype_name(than), factor=factor) if factor >= FACTOR else None


def _seconds(backend: Backend, dtype: torch.dtype) -> float | None:
    """Return how long a product takes at best; None if it fails, which the check of dtypes reports."""
    try:
        with plugin_code():
            x = torch.full((ROWS, WIDTH), 1 / WIDTH, dtype=dtype, device=backend.device)
            weight = torch.full((WIDTH, WIDTH), 1.0, dtype=dtype, device=backend.device)
            return _best(x, weight)
    except Exception:  # noqa: BLE001  # whatever a stack raises for a dtype that it does not have
        return None


def _best(x: torch.Tensor, weight: torch.Tensor) -> float:
    end, found = time.perf_counter() + PATIENCE, []
    for _ in range(ATTEMPTS + 1):
        start = time.perf_counter()
        torch.mm(x, weight)[:1, :1].to("cpu", copy=True)  # only a result on the host is certain to be there
        now = time.perf_counter()
        found.append(now - start)
        if now > end:
            break
    return min(found[1:] or found)


def dtypes_of(slow: Sequence[Slow]) -> frozenset[torch.dtype]:
    """Return the dtypes themselves."""
    return frozenset(getattr(torch, one.dtype) for one in slow)
