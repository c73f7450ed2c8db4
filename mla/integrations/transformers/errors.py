"""What cannot be served."""

from __future__ import annotations

from mla.errors import MLAError


class UnsupportedModel(MLAError):
    """A model, a cache or a feature of `transformers` that `use_mla` does not serve."""
