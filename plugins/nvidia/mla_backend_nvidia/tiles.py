"""Tiles of the Triton kernels on cards that none was measured on.

Not run on hardware. They fit, and Triton 3.8 spills none of them: benchmarks/triton/table.md.
"""

from __future__ import annotations

import re

from mla_backends.triton_ops import Tile, Tuning

KIB = 1024

# Bytes of shared memory that a block may use -> the tuning for as many and more. Two programs with 16 rows
# fit on a multiprocessor: such steps wait for memory, so one computes while the other loads.
BY_SHARED_MEMORY = {
    200 * KIB: Tuning(
        latent={1: Tile(16, 32, 4, 3, halves=False, programs=2), 33: Tile(64, 64, 8, 2, halves=False)},
        expanded={1: Tile(64, 64, 4, 2), 65: Tile(128, 64, 8, 3)},
        source="defaults for 200 KiB of shared memory",
    ),
    160 * KIB: Tuning(
        latent={1: Tile(16, 32, 4, 2, programs=2), 33: Tile(64, 32, 8, 2)},
        expanded={1: Tile(64, 32, 4, 2)},
        source="defaults for 160 KiB of shared memory",
    ),
    96 * KIB: Tuning(
        latent={1: Tile(16, 16, 4, 2, programs=2), 33: Tile(64, 16, 8, 2)},
        expanded={1: Tile(64, 32, 4, 2)},
        source="defaults for 96 KiB of shared memory",
    ),
    0: Tuning(
        latent={1: Tile(16, 16, 4, 1)},
        expanded={1: Tile(32, 32, 4, 1)},
        source="defaults for little or unknown shared memory",
    ),
}
# The shared memory of Hopper, but products of 64 rows keep their sums in tensor memory, where less fits.
DATACENTER_BLACKWELL = re.compile(r"\bG?B[123]00\b")
BLACKWELL = Tuning(
    latent={1: Tile(16, 32, 4, 3, halves=False, programs=2), 33: Tile(64, 16, 8, 2, halves=False)},
    expanded={1: Tile(64, 64, 4, 2), 65: Tile(128, 64, 8, 2)},
    source="defaults for tensor memory",
)


def tuning_for(shared_memory: int | None, name: str = "") -> Tuning:
    """Return the tuning for a card of this name, whose blocks may use so much shared memory.

    `shared_memory` is in bytes; None is unknown.
    """
    if DATACENTER_BLACKWELL.search(name):
        return BLACKWELL
    return next(found for least, found in BY_SHARED_MEMORY.items() if least <= (shared_memory or 0))
