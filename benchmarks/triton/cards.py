"""What cards can do per cycle, as their makers publish it: the constants of the model of key steps.

Every number has a source that anyone can read. Rates are dense, in bfloat16, with sums in float32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

DATA = Path(__file__).with_name("model.json")  # what `model` predicts of these cards

_HOPPER = "https://resources.nvidia.com/en-us-tensor-core/gtc22-whitepaper-hopper"
_AMPERE = (
    "https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf"
)
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_RTX_BLACKWELL = (
    "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
)
_H200 = "https://www.nvidia.com/en-us/data-center/h200/"
_A100 = "https://www.nvidia.com/en-us/data-center/a100/"
_B200 = "https://www.nvidia.com/en-us/data-center/hgx/"
_MI300X = "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html"
_CDNA3 = "https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/white-papers/amd-cdna-3-white-paper.pdf"
# 32 banks of 4 bytes a cycle; four schedulers that start an instruction a cycle each.
_CUDA = "https://docs.nvidia.com/cuda/cuda-c-programming-guide/index.html#compute-capabilities"
# Four SIMD units of 16 lanes take a vector instruction of 64 lanes in four cycles; 128 bytes a cycle of LDS.
_CDNA = "https://rocm.docs.amd.com/projects/omniperf/en/docs-6.3.0/conceptual/pipeline-descriptions.html"
_MMA_ON_HOPPER = "https://arxiv.org/abs/2402.13499"  # mma reaches 62.9 % of Hopper's peak, wgmma all of it
_TCGEN05 = "https://newsletter.semianalysis.com/p/dissecting-nvidia-blackwell-tensor"  # 64 rows: half


class Card(NamedTuple):
    """One card. `flops` and `shared` are per multiprocessor and cycle, `flops` by matrix instruction."""

    target: str  # what kernels are compiled for
    processors: int
    ghz: float  # boost
    gigabytes: float  # per second, from memory
    flops: Mapping[str, float]
    peak: float  # the most of `flops`, also where no instruction of ours reaches it
    shared: int  # bytes
    issued: int  # instructions of a warp; on AMD, vector instructions
    sources: tuple[str, ...]

    def memory(self) -> float:
        """Return the bytes that memory delivers to each multiprocessor in a cycle."""
        return self.gigabytes / self.processors / self.ghz

    def tflops(self) -> float:
        """Return the peak of the whole card, in 10^12 FLOP per second."""
        return self.peak * self.processors * self.ghz / 1e3


_OF_HOPPER = {"wgmma": 4096.0, "mma": 0.629 * 4096}
CARDS: Mapping[str, Card] = {
    "H100": Card(
        "sm_90", 132, 1.83, 3350, _OF_HOPPER, 4096, 128, 4, (_HOPPER, _CUDA, _MMA_ON_HOPPER)
    ),
    "H200": Card(
        "sm_90", 132, 1.83, 4800, _OF_HOPPER, 4096, 128, 4, (_H200, _HOPPER, _CUDA, _MMA_ON_HOPPER)
    ),
    "A100": Card("sm_80", 108, 1.41, 2039, {"mma": 2048.0}, 2048, 128, 4, (_A100, _AMPERE, _CUDA)),
    "RTX 4090": Card("sm_89", 128, 2.52, 1008, {"mma": 512.0}, 512, 128, 4, (_ADA, _CUDA)),
    # The clock follows from the sheet's 2.25 PFLOP/s. No rate of mma is public: Ampere's is assumed.
    "B200": Card(
        "sm_100", 148, 1.856, 8000, {"tcgen05": 8192.0, "tcgen05, 64 rows": 4096.0, "mma": 2048.0}, 8192,
        128, 4, (_B200, _CUDA, _TCGEN05),
    ),
    "RTX 5090": Card("sm_120", 170, 2.407, 1792, {"mma": 512.0}, 512, 128, 4, (_RTX_BLACKWELL, _CUDA)),
    "MI300X": Card("gfx942", 304, 2.1, 5300, {"mfma": 2048.0}, 2048, 128, 1, (_MI300X, _CDNA3, _CDNA)),
}  # fmt: skip


# What the driver calls the cards above. Others of a series, such as H100 PCIe, have other clocks and memory.
DEVICES = {
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H200": "H200",
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "NVIDIA B200": "B200",
    "NVIDIA GeForce RTX 5090": "RTX 5090",
}


def card_of(device: str) -> str:
    """Return the card that a device is; "" for any other, and for MI300X, which no plugin has tiles for.

    `device` is its name, behind that of a backend or alone.
    """
    return DEVICES.get(device.rpartition(", ")[2], "")


def spoken(share: Sequence[float]) -> str:
    """Return a range of shares in percent; "-" of what is not in the model."""
    low, high = (f"{100 * value:.0f}" for value in share)
    return f"{low}-{high} %" if share[1] else "-"


def read() -> dict[str, Any]:
    """Return the committed predictions: {"kernels": fingerprint, "rows": rows}."""
    data: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8"))
    return data
