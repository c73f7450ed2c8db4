"""Kept for code that imports it from here; it lives in `mla_backends.torch_backend.graph`."""

from mla_backends.torch_backend.graph import WARMUPS, capture

__all__ = ["WARMUPS", "capture"]
