"""How much is flushed, that all of it is, and that the device has finished."""

from __future__ import annotations

import pytest
import torch

from mla.bench.measure.cold_cache import FALLBACK, LEAST, MOST, CacheFlush
from mla_backends import Availability, Backend
from mla_backends.api import DeviceInfo


class Cached(Backend):
    """A host whose cache has a given size."""

    name = "cached"
    api_version = 1
    device = torch.device("cpu")

    def __init__(self, cache_bytes: int | None) -> None:
        super().__init__()
        self._bytes = cache_bytes
        self.waits = 0

    def probe(self) -> Availability:
        return Availability(ok=True)

    def setup(self, index: int | None = None) -> torch.device:
        return self.device

    def synchronize(self) -> None:
        self.waits += 1

    def device_info(self) -> DeviceInfo:
        return DeviceInfo(name=self.name, cache_bytes=self._bytes)


@pytest.mark.parametrize(
    ("cache", "flushed", "words"),
    [
        (
            32 << 20,
            64 << 20,
            "64 MiB read and written before every timed forward, for a last-level cache of 32 MiB",
        ),
        (
            None,
            FALLBACK,
            "256 MiB read and written before every timed forward, for a last-level cache of unknown",
        ),
        (
            1 << 40,
            MOST,
            "512 MiB read and written before every timed forward, for a last-level cache of 1.04858e+06",
        ),
        (1000, LEAST, "1 MiB read and written"),
    ],
    ids=["known", "unknown", "huge", "tiny"],
)
def test_twice_the_cache_within_bounds(cache: int | None, flushed: int, words: str) -> None:
    flush = CacheFlush(Cached(cache))
    assert flush.bytes == flushed
    assert flush.method().startswith(words)


def test_every_byte_is_written_and_waited_for() -> None:
    backend = Cached(1 << 20)
    flush = CacheFlush(backend)
    for times in (1, 2):
        flush()
        assert backend.waits == times
        assert flush._buffer.nbytes == flush.bytes
        assert bool((flush._buffer == times).all())
