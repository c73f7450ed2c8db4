"""Measuring and running DeepSeek's Multi-head Latent Attention on any accelerator."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mla.attention import MLA
    from mla.batch import RaggedBatch
    from mla.cache import LatentCache
    from mla.config import MLAConfig
    from mla.device import load_backend

__version__ = "0.1.0"

_HOMES = {
    "MLA": "mla.attention",
    "MLAConfig": "mla.config",
    "LatentCache": "mla.cache",
    "RaggedBatch": "mla.batch",
    "load_backend": "mla.device",
}

__all__ = ["MLA", "LatentCache", "MLAConfig", "RaggedBatch", "load_backend"]


def __getattr__(name: str) -> object:
    """Import on first use, so that commands which only read result files need no torch."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mla' has no attribute {name!r}")
