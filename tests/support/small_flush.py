"""A cold cache without the time it takes: on a host with hundreds of MiB of cache, that is most of a test."""

from __future__ import annotations

import pytest

from mla.bench.measure import passes as cold_cache


def flush_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let cold passes write 1 MiB. How much it would be, and why, is still what `sweep` says."""
    sweep = cold_cache.sweep
    monkeypatch.setattr(cold_cache, "sweep", lambda backend: (1 << 20, sweep(backend)[1]))
