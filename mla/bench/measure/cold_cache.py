"""Flush the last-level cache, so that the next forward finds nothing of the layer in it.

A buffer of twice the cache is read and written on the device, and finished before timing starts. That evicts
weights, latents, hidden states and tables from every data cache on the way to memory. It does not empty
instruction caches, branch predictors or TLBs, and on an accelerator it leaves the host's caches alone.
"""

from __future__ import annotations

import torch

from mla.text import size
from mla_backends.api import Backend

# Size of the buffer relative to the cache: replacement is not strictly oldest first.
TIMES = 2
# Size of the buffer in bytes if the size of the cache is unknown.
FALLBACK = 256 << 20
# Bounds of the buffer in bytes: flushing a whole machine's shared cache would take longer than the forwards.
LEAST, MOST = 1 << 20, 512 << 20


class CacheFlush:
    """A buffer on the backend's device; calling the object flushes the cache and waits for the device."""

    def __init__(self, backend: Backend) -> None:
        self._cache = backend.device_info().cache_bytes
        wanted = FALLBACK if self._cache is None else TIMES * self._cache
        self.bytes = min(max(wanted, LEAST), MOST)
        self._buffer = torch.zeros(self.bytes // 4, dtype=torch.float32, device=backend.device)
        self._synchronize = backend.synchronize

    def __call__(self) -> None:
        self._buffer.add_(1)
        self._synchronize()

    def method(self) -> str:
        """Return how the cache is flushed, for the result."""
        known = "a last-level cache of unknown size"
        if self._cache is not None:
            known = f"a last-level cache of {size(self._cache, MiB='g')}"
        return f"{size(self.bytes, MiB='g')} read and written before every timed forward, for {known}"
