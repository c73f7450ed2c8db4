"""Kept for plugins that import it from here; it lives in `mla_backends.torch_backend.report`."""

from mla_backends.torch_backend.report import known

__all__ = ["known"]
