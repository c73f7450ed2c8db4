"""FlashInfer."""

__version__ = "0.2.5"
