"""Peak rates that NVIDIA publishes, for cards identified by name and memory. All others are unknown.

A name alone is not enough: a MIG slice and a card with different memory may share it. FLOP/s are dense;
figures that a sheet gives with sparsity are halved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from mla_backends.api import Peak


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
