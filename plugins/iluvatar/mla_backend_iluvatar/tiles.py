"""Tiles of the Triton kernels on Iluvatar GPUs. Not run on hardware."""

from __future__ import annotations

from mla_backends.triton_ops import Tile, Tuning

# Eight warps and no pipeline, as FlagGems has it here; 64 KiB of shared memory hold these.
DEFAULTS = Tuning(latent={1: Tile(16, 32, 8, 1)}, expanded={1: Tile(64, 32, 8, 1)})
