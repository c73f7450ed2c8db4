"""Tiles of the Triton kernels on Iluvatar GPUs. Not run on hardware."""

from __future__ import annotations

from mla_backends.triton_ops import Tile, Tuning

# What FlagGems takes for its own latent attention here.
DEFAULTS = Tuning(latent={1: Tile(32, 32, 8, 1)}, expanded={1: Tile(32, 32, 8, 1)})
