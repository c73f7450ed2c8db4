"""Measuring and running DeepSeek's Multi-head Latent Attention on any accelerator."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mla.backend import load_backend
    from mla.cache import LatentCache
    from mla.cache.ragged_batch import RaggedBatch
    from mla.config import MLAConfig
    from mla.layer.attention import MLA

__version__ = "0.1.0"

_HOMES = {
    "MLA": "mla.layer.attention",
    "MLAConfig": "mla.config",
    "LatentCache": "mla.cache",
    "RaggedBatch": "mla.cache.ragged_batch",
    "load_backend": "mla.backend",
}

__all__ = ["MLA", "LatentCache", "MLAConfig", "RaggedBatch", "load_backend"]


def __dir__() -> list[str]:
    """Offer what is public to completion, before its first use."""
    return [*__all__, "__version__"]


def __getattr__(name: str) -> object:
    """Import on first use, so that commands which only read result files need no torch."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mla' has no attribute {name!r}")
