"""The one error of the loader."""

from __future__ import annotations

from mla.errors import MLAError


class CheckpointError(MLAError):
    """A checkpoint that cannot serve a layer; names file, tensor and cause."""
