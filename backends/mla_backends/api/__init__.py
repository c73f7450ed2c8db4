"""The contract between `mla` and an accelerator: what a backend must provide, and what it may offer.

A backend is a plain object. It *must* name itself, probe, set up a device and synchronize; everything else
has a default that means "unknown" or "not offered". Fused ops are optional: the core has a plain PyTorch
reference for every op in `OPS`, and runs it wherever a backend offers nothing better.

Importing this package does not import torch, so a plugin can be discovered on a host without it.
"""

from mla_backends.api.backend import Backend
from mla_backends.api.facts import Availability, DeviceInfo, MemoryInfo, Peak
from mla_backends.api.ops import (
    OPS,
    AttentionSpec,
    BatchView,
    FusedOp,
    LinearSpec,
    NormSpec,
    OpCall,
    Packed,
    SegmentLengths,
)
from mla_backends.api.timing import HostTimer, Timer

API_VERSION = 1

__all__ = [
    "API_VERSION",
    "OPS",
    "AttentionSpec",
    "Availability",
    "Backend",
    "BatchView",
    "DeviceInfo",
    "FusedOp",
    "HostTimer",
    "LinearSpec",
    "MemoryInfo",
    "NormSpec",
    "OpCall",
    "Packed",
    "Peak",
    "SegmentLengths",
    "Timer",
]
