"""How much is flushed, that all of it is, and that the device has finished."""

from __future__ import annotations

import pytest

from mla.bench.measure.cold_cache import FALLBACK, LEAST, MOST, CacheFlush
from mla_backends.testing import HostBackend


class Counting(HostBackend):
    """Counts how often it is synchronized."""

    waits = 0

    def synchronize(self) -> None:
        self.waits += 1


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
    flush = CacheFlush(HostBackend(cache_bytes=cache))
    assert flush.bytes == flushed
    assert flush.method().startswith(words)


def test_every_byte_is_written_and_waited_for() -> None:
    backend = Counting(cache_bytes=1 << 20)
    flush = CacheFlush(backend)
    for times in (1, 2):
        flush()
        assert backend.waits == times
        assert flush._buffer.nbytes == flush.bytes
        assert bool((flush._buffer == times).all())
