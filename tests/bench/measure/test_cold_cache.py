"""How much is flushed and why, that all of it is, and that nothing of the backend runs afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mla.bench.measure import passes as cold_cache
from mla.bench.measure.passes import FALLBACK_BYTES, MAX_FLUSH_BYTES, MIN_FLUSH_BYTES, CacheFlush, sweep
from mla_backends.testing import HostBackend

MIB = 1 << 20
AGAINST = " (as the host reports; the backend declares less)"


class Card(HostBackend):
    """A backend whose device is not the host."""

    def setup(self, index: int | None = None) -> torch.device:
        return torch.device("meta")


@pytest.mark.parametrize(
    ("declared", "flushed", "reason"),
    [
        (48 * MIB, 96 * MIB, "for a last-level cache of 48 MiB"),
        (6 * MIB, MIN_FLUSH_BYTES, "for a last-level cache of 6 MiB"),
        (MIB, MIN_FLUSH_BYTES, "for a last-level cache of 1 MiB"),
        (None, FALLBACK_BYTES, "for a last-level cache of unknown size"),
        (
            300 * MIB,
            MAX_FLUSH_BYTES,
            "for a last-level cache of 300 MiB: less than twice its size, so that some of it may stay warm",
        ),
        (256 * MIB, MAX_FLUSH_BYTES, "for a last-level cache of 256 MiB"),
        (4096, FALLBACK_BYTES, "for a last-level cache that cannot be as small as the 4096 bytes declared"),
        (0, FALLBACK_BYTES, "for a last-level cache of unknown size"),
        (
            MIB - 1,
            FALLBACK_BYTES,
            "for a last-level cache that cannot be as small as the 1048575 bytes declared",
        ),
    ],
)
def test_twice_the_cache_within_bounds_and_a_tiny_one_is_not_believed(
    declared: int | None, flushed: int, reason: str
) -> None:
    assert sweep(Card(cache_bytes=declared)) == (flushed, reason)


@pytest.mark.parametrize(
    ("declared", "detected", "flushed", "reason"),
    [
        (32 * MIB, 32 * MIB, 64 * MIB, "for a last-level cache of 32 MiB"),
        (32 * MIB, 40 * MIB, 80 * MIB, f"for a last-level cache of 40 MiB{AGAINST}"),
        (4096, 256 * MIB, 512 * MIB, f"for a last-level cache of 256 MiB{AGAINST}"),
        (2 * MIB, 96 * MIB, 192 * MIB, f"for a last-level cache of 96 MiB{AGAINST}"),
        (None, 96 * MIB, 192 * MIB, "for a last-level cache of 96 MiB"),
        (64 * MIB, None, 128 * MIB, "for a last-level cache of 64 MiB"),
    ],
)
def test_on_the_host_its_own_caches_are_known_better(
    declared: int | None, detected: int | None, flushed: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cold_cache.host, "last_level_cache", lambda: detected)
    assert sweep(HostBackend(cache_bytes=declared)) == (flushed, reason)


class Warming(HostBackend):
    """A backend whose every function but the facts would warm the cache after a sweep."""

    def __init__(self, *words: Any, **facts: Any) -> None:
        super().__init__(*words, **facts)
        self.called: list[str] = []

    def synchronize(self) -> None:
        self.called.append("synchronize")


def test_every_byte_is_written_and_the_backend_is_not_called_after_it() -> None:
    backend = Warming(cache_bytes=MIB)
    flush = CacheFlush(backend)
    for times in (1, 2):
        flush()
        assert backend.called == []
        assert flush._buffer.nbytes == flush.bytes
        assert bool((flush._buffer == times).all())
    assert flush.method.startswith(
        f"{flush.bytes // MIB} MiB read and written before every timed forward, for"
    )


def test_the_sweep_is_waited_for_by_reading_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[float, Any]] = []
    to: Callable[..., torch.Tensor] = torch.Tensor.to

    def copied(self: torch.Tensor, *where: Any, **more: Any) -> torch.Tensor:
        read.append((float(self), where))
        return to(self, *where, **more)

    flush = CacheFlush(HostBackend())
    monkeypatch.setattr(torch.Tensor, "to", copied)
    flush()
    assert read == [(1.0, ("cpu",))]
