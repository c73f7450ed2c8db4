"""Tiles of the Triton kernels on cards that none was measured on, by the shared memory of a block.

Not run on hardware: what fits, and what the compiler spills, is from compiling ahead of time.
"""

from __future__ import annotations

from mla_backends.triton_ops import Tile, Tuning

KIB = 1024

# Bytes that a block may use -> the tuning for as many and more.
BY_SHARED_MEMORY = {
    200 * KIB: Tuning(
        latent={1: Tile(16, 64, 4, 2), 33: Tile(64, 32, 8, 2)},
        expanded={1: Tile(64, 64, 4, 2), 65: Tile(128, 64, 8, 2)},
        source="defaults for 200 KiB of shared memory",
    ),
    160 * KIB: Tuning(
        latent={1: Tile(16, 64, 4, 2), 33: Tile(32, 32, 8, 2)},
        expanded={1: Tile(64, 64, 4, 2)},
        source="defaults for 160 KiB of shared memory",
    ),
    96 * KIB: Tuning(
        latent={1: Tile(16, 32, 4, 2), 33: Tile(32, 32, 8, 1)},
        expanded={1: Tile(64, 32, 4, 2)},
        source="defaults for 96 KiB of shared memory",
    ),
    0: Tuning(
        latent={1: Tile(16, 16, 4, 1)},
        expanded={1: Tile(32, 32, 4, 1)},
        source="defaults for little or unknown shared memory",
    ),
}


def tuning_for(shared_memory: int | None) -> Tuning:
    """Return the tuning for a card whose blocks may use so many bytes of shared memory; None is unknown."""
    return next(found for least, found in BY_SHARED_MEMORY.items() if least <= (shared_memory or 0))
