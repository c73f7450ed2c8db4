"""The paged latent cache, and the ragged batches of its steps."""

from mla.cache.latent_cache import LatentCache

__all__ = ["LatentCache"]
