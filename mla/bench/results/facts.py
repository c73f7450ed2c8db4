"""What a result says of the backend that ran."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mla.bench.results.build import build_digest
from mla.bench.results.schema import BackendFacts

if TYPE_CHECKING:
    from mla_backends.api import Backend


def backend_facts(backend: Backend, version: str | None) -> BackendFacts:
    """Return what ran; `version` is that of the backend's distribution."""
    info = backend.device_info()
    return BackendFacts(
        name=backend.name,
        version=version,
        device=info.name,
        memory_bytes=info.memory_bytes,
        cache_bytes=info.cache_bytes,
        build=build_digest(backend),
    )
