"""Flush the last-level cache, so that the next forward finds nothing of the layer in it.

A buffer of twice the cache is read and written on the device, and finished before timing starts. That evicts
weights, latents, hidden states and tables from every data cache on the way to memory. It does not empty
instruction caches, branch predictors or TLBs, and on an accelerator it leaves the host's caches alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mla.text import size
from mla_backends import host
from mla_backends.api import Backend

# Size of the buffer relative to the cache: replacement is not strictly oldest first.
TIMES = 2
# Size of the buffer in bytes if the size of the cache is unknown, or declared below what any device has.
FALLBACK, INCREDIBLE = 256 << 20, 1 << 20
# Bounds of the buffer in bytes: flushing a whole machine's shared cache would take longer than the forwards.
LEAST, MOST = 64 << 20, 512 << 20


class Sweep(NamedTuple):
    """How much is read and written, and why so much."""

    bytes: int
    reason: str


def sweep(backend: Backend) -> Sweep:
    """Return what flushes the last-level cache of a backend's device.

    Its declared size is held against what is known from elsewhere: the host's own caches, where it is the
    device, and what no device falls short of.
    """
    declared, own = backend.device_info().cache_bytes, None
    if backend.device is not None and backend.device.type == "cpu":
        own = host.last_level_cache()
    if declared is not None and declared < INCREDIBLE and own is None:
        return Sweep(FALLBACK, f"as {_size(declared)} cannot be the last-level cache that was declared")
    if declared is None and own is None:
        return Sweep(FALLBACK, "for a last-level cache of unknown size")
    cache = max(declared or 0, own or 0)
    reason = f"for a last-level cache of {_size(cache)}"
    if own and declared is not None and declared < own:
        reason += f", which the host reports and the backend declares as {_size(declared)}"
    if TIMES * cache > MOST:
        reason += ": less than twice its size, so that some of it may stay warm"
    return Sweep(min(max(TIMES * cache, LEAST), MOST), reason)


def _size(count: int) -> str:
    return size(count, MiB="g") if count >= INCREDIBLE else f"{count} bytes"


class CacheFlush:
    """A buffer on the backend's device; calling the object flushes the cache and waits for the device."""

    def __init__(self, backend: Backend) -> None:
        self.bytes, self._reason = sweep(backend)
        self._buffer = torch.zeros(self.bytes // 4, dtype=torch.float32, device=backend.device)

    def __call__(self) -> None:
        """Flush. Nothing of the backend is called: it could warm the cache again."""
        self._buffer.add_(1)
        self._buffer[-1].to("cpu")  # waits for the sweep, in the order of the stream

    def method(self) -> str:
        """Return how the cache is flushed, for the result."""
        return f"{size(self.bytes, MiB='g')} read and written before every timed forward, {self._reason}"
