"""What depends on the card: peak rates, and tiles of the Triton kernels; and the version of its driver.

Peak rates are those that NVIDIA publishes, for cards identified by name and memory. All others are unknown.
A name alone is not enough: a MIG slice and a card with different memory may share it. FLOP/s are dense;
figures that a sheet gives with sparsity are halved.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from mla_backends.api import Peak
from mla_backends.triton_ops import Tile, Tuning


class Sheet(NamedTuple):
    """One card's data sheet."""

    memory: float  # 10^9 bytes, nominal
    bandwidth: float  # 10^9 bytes per second
    tensor: float  # 10^12 dense FLOP per second in bfloat16 and float16
    float32: float  # 10^12 FLOP per second without TF32
    source: str


_H100 = "https://www.nvidia.com/en-us/data-center/h100/"
_H200 = "https://www.nvidia.com/en-us/data-center/h200/"
_A100 = "https://www.nvidia.com/en-us/data-center/a100/"
_A100_40 = (
    "https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf"
)

# By the name that the driver reports.
SHEETS: Mapping[str, Sheet] = {
    "NVIDIA H100 80GB HBM3": Sheet(80, 3350, 989, 67, _H100),
    "NVIDIA H200": Sheet(141, 4800, 989, 67, _H200),
    "NVIDIA A100-SXM4-80GB": Sheet(80, 2039, 312, 19.5, _A100),
    "NVIDIA A100 80GB PCIe": Sheet(80, 1935, 312, 19.5, _A100),
    "NVIDIA A100-SXM4-40GB": Sheet(40, 1555, 312, 19.5, _A100_40),
}
TOLERANCE = 0.1  # how much the reported memory may differ from the nominal size


def peaks(name: str, memory_bytes: int | None) -> tuple[Peak | None, dict[str, Peak]]:
    """Return bandwidth and FLOP/s by dtype name of a known card; None and nothing for any other."""
    sheet = SHEETS.get(name)
    if sheet is None or memory_bytes is None or abs(memory_bytes / 1e9 / sheet.memory - 1) > TOLERANCE:
        return None, {}
    tensor, plain = (Peak(1e12 * value, sheet.source) for value in (sheet.tensor, sheet.float32))
    bandwidth = Peak(1e9 * sheet.bandwidth, sheet.source)
    return bandwidth, {"bfloat16": tensor, "float16": tensor, "float32": plain}


# -------------------------------------------------------------------------------------------- tiles
# Tiles of the Triton kernels on cards that none was measured on.
#
# Not run on hardware. They fit, and Triton 3.6 to 3.9 spill none of them: benchmarks/triton/table.md.

KIB = 1024

# Bytes of shared memory that a block may use -> the tuning for as many and more. Two programs with 16 rows
# fit on a multiprocessor: such steps wait for memory, so one computes while the other loads.
BY_SHARED_MEMORY = {
    200 * KIB: Tuning(
        latent={1: Tile(16, 64, 4, 2, halves=False, programs=2), 33: Tile(64, 64, 8, 2, halves=False)},
        expanded={1: Tile(64, 64, 4, 2), 65: Tile(128, 64, 8, 3)},
        source="defaults for 200 KiB of shared memory",
    ),
    160 * KIB: Tuning(
        latent={1: Tile(16, 32, 4, 2, programs=2), 33: Tile(64, 32, 8, 2)},
        expanded={1: Tile(64, 32, 4, 2)},
        source="defaults for 160 KiB of shared memory",
    ),
    96 * KIB: Tuning(
        latent={1: Tile(16, 16, 2, 2, halves=False, programs=2), 33: Tile(64, 16, 8, 2)},
        expanded={1: Tile(64, 32, 4, 2)},
        source="defaults for 96 KiB of shared memory",
    ),
    0: Tuning(
        latent={1: Tile(16, 16, 4, 1)},
        expanded={1: Tile(32, 32, 4, 1)},
        source="defaults for little or unknown shared memory",
    ),
}
# The shared memory of Hopper, but products of 64 rows keep their sums in tensor memory, where less fits. They
# move to registers and back in every step: 18 to 36 % of the tensor peak, counted in compiled code. Rescaling
# them only where a maximum has grown by much saves none of these moves with Triton 3.9, so kernels made for
# it come first: `AHEAD_OF_FLASHINFER` in kernels.py.
DATACENTER_BLACKWELL = re.compile(r"\bG?B[123]00\b")
BLACKWELL = Tuning(
    latent={
        1: Tile(16, 64, 4, 2, halves=False, programs=2, spread=False),
        33: Tile(64, 32, 8, 2, halves=False, spread=False),
    },
    expanded={1: Tile(64, 64, 4, 2), 65: Tile(128, 64, 8, 2)},
    source="defaults for tensor memory",
)


# What one Triton spills: its version, the tuning, and by format the tile from 33 rows on. Each moves more
# through shared memory for a key, counted: 1.35 times as much on Hopper, 1.36 on Ampere, and 3.7 with tensor
# memory, where that is predicted to take 2.4 to 2.6 times as long.
SPARING: Mapping[tuple[tuple[int, ...], str], Mapping[str, Tile]] = {
    ((3, 8), BY_SHARED_MEMORY[200 * KIB].source): dict.fromkeys(
        ("fp8_ds_mla", "int8"), Tile(64, 32, 8, 2, halves=False)
    ),
    ((3, 8), BLACKWELL.source): dict.fromkeys(("fp8_ds_mla", "int8"), BLACKWELL.latent[1]),
    ((3, 6), BY_SHARED_MEMORY[160 * KIB].source): {"int8": Tile(64, 16, 8, 3)},
}


def tuning_for(shared_memory: int | None, name: str = "", triton: tuple[int, ...] = ()) -> Tuning:
    """Return the tuning for a card of this name, whose blocks may use so much shared memory.

    `shared_memory` is in bytes; None is unknown. `triton`: the version that compiles, such as (3, 8); () is
    unknown, and taken for a new one.
    """
    least = next(least for least in BY_SHARED_MEMORY if least <= (shared_memory or 0))
    tuning = BLACKWELL if DATACENTER_BLACKWELL.search(name) else BY_SHARED_MEMORY[least]
    spared = SPARING.get((triton, tuning.source), {})
    return replace(tuning, caches={form: {**tuning.latent, 33: tile} for form, tile in spared.items()})


def driver_version(file: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Return the version of the kernel driver, for hosts without a management library; "" if unknown."""
    match = re.search(r"Module.*?\s(\d+(?:\.\d+)+)\s", file.read_text()) if file.is_file() else None
    return match[1] if match else ""
