"""The paged latent cache, and the ragged batches that are cut from it."""

from mla.cache.latent_cache import LatentCache

__all__ = ["LatentCache"]
