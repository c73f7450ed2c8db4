"""FlashInfer."""

__version__ = "0.7.2.post1"
