"""Tiles of the Triton kernels on MetaX GPUs. Not run on hardware."""

from __future__ import annotations

from mla_backends.triton_ops import Tile, Tuning

# 64 KiB of shared memory, and larger tiles have made its compiler hang (FlagGems, issue 6191).
DEFAULTS = Tuning(latent={1: Tile(16, 16, 4, 1)}, expanded={1: Tile(32, 32, 4, 1)})
