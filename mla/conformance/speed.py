"""Which dtypes a device is slow in: those that take much longer than wider numbers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import torch

from mla.conformance.report import Slow
from mla.conformance.trial import ask
from mla.text import dtype_name
from mla_backends.api import Backend

# A product [ROWS, WIDTH] x [WIDTH, WIDTH] that takes this many times as long as in a wider dtype is slow.
FACTOR = 3.0
ROWS, WIDTH = 64, 1024
ATTEMPTS = 5
PATIENCE = 0.5  # seconds after which a dtype has been tried often enough


def slow_dtypes(backend: Backend, dtypes: Sequence[torch.dtype]) -> tuple[Slow, ...]:
    """Return the dtypes that the backend's device is slow in, of those given."""
    if len(dtypes) < 2 or backend.device is None:
        return ()
    taken = {dtype: ask(partial(_seconds, backend, dtype), None) for dtype in dtypes}
    known = {dtype: seconds for dtype, seconds in taken.items() if seconds is not None}
    slow = []
    for dtype, seconds in known.items():
        wider = [other for other in known if other.itemsize > dtype.itemsize]
        than = min(wider, key=known.__getitem__, default=dtype)
        if seconds >= FACTOR * known[than]:
            slow.append(Slow(dtype=dtype_name(dtype), than=dtype_name(than), factor=seconds / known[than]))
    return tuple(slow)


def _seconds(backend: Backend, dtype: torch.dtype) -> float:
    """Return how long a product takes at best."""
    x = torch.full((ROWS, WIDTH), 1 / WIDTH, dtype=dtype, device=backend.device)
    weight = torch.full((WIDTH, WIDTH), 1.0, dtype=dtype, device=backend.device)
    end, taken = time.perf_counter() + PATIENCE, []
    for _ in range(ATTEMPTS + 1):
        start = time.perf_counter()
        torch.mm(x, weight)[:1, :1].to("cpu", copy=True)  # only a result on the host is certain to be there
        now = time.perf_counter()
        taken.append(now - start)
        if now > end:
            break
    return min(taken[1:] or taken)


def dtypes_of(slow: Sequence[Slow]) -> frozenset[torch.dtype]:
    """Return the dtypes themselves."""
    return frozenset(getattr(torch, one.dtype) for one in slow)
