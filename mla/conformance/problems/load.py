"""Work that keeps the device busy for a known time, and clocks around it."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch

from mla.conformance.trial import BackendUnderTest

ATTEMPTS = 5
UNIT_MS = 2.0  # one unit of work should take at least this many milliseconds ...
MAX_SIZE = 8192  # ... unless matrices of this size are still faster


class MatmulLoad:
    """Matrix products that take a known time; only reading a result back is certain to wait."""

    def __init__(self, subject: BackendUnderTest) -> None:
        claimed = subject.backend.dtypes()
        self._dtype = torch.float32 if torch.float32 in claimed or not claimed else claimed[0]
        self._device = subject.device
        self._size = 128
        self._resize(128)
        while self.milliseconds() < UNIT_MS and self._size < MAX_SIZE:
            self._resize(2 * self._size)

    def _resize(self, size: int) -> None:
        self._size = size
        shape = (size, size)
        self._x = torch.full(shape, 1.0 / size, dtype=self._dtype, device=self._device)
        self._y = torch.empty(shape, dtype=self._dtype, device=self._device)
        self.submit()
        self.read()

    def submit(self, units: int = 1) -> None:
        """Queue work."""
        for _ in range(units):
            torch.mm(self._x, self._x, out=self._y)

    def read(self) -> None:
        """Wait, by needing the result on the host."""
        self._y[:1, :1].to("cpu", copy=True)

    def _finish(self, units: int) -> None:
        self.submit(units)
        self.read()

    def milliseconds(self, units: int = 1) -> float:
        """Return how long work takes until its result is on the host, at best."""
        return best(lambda: elapsed(lambda: self._finish(units)))


def elapsed(action: Callable[[], object]) -> float:
    """Return the milliseconds an action takes on the host's clock."""
    start = time.perf_counter()
    action()
    return 1e3 * (time.perf_counter() - start)


def best(measure: Callable[[], float], attempts: int = ATTEMPTS) -> float:
    """Return the smallest of several measurements."""
    return min(measure() for _ in range(attempts))


def usual(measure: Callable[[], float], attempts: int = ATTEMPTS) -> float:
    """Return the median of several measurements."""
    return statistics.median(measure() for _ in range(attempts))


@functools.lru_cache(maxsize=1)
def load_of(subject: BackendUnderTest) -> MatmulLoad:
    """Return the load of a backend, whose size takes half a second to find."""
    return MatmulLoad(subject)
