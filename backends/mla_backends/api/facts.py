"""What a backend reports about its device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Availability:
    """What `Backend.probe` found. When `ok` is false, `reason` and `hint` are printed to the user."""

    ok: bool
    reason: str = ""  # why the device cannot be used, one clause
    hint: str = ""  # what the user can do about it, one clause
    evidence: Mapping[str, str] = field(default_factory=dict)  # marker -> what was seen


@dataclass(frozen=True)
class Peak:
    """A peak rate of the device, and the source of the figure (a URL, or how it was measured)."""

    value: float
    source: str


@dataclass(frozen=True)
class DeviceInfo:
    """Facts about a device. None means unknown; zero is never used for unknown."""

    name: str
    memory_bytes: int | None = None
    cache_bytes: int | None = None  # last-level cache, which decides whether weights stay warm
    bandwidth: Peak | None = None  # bytes per second
    flops: Mapping[str, Peak] = field(default_factory=dict)  # dtype name -> dense FLOP per second


@dataclass(frozen=True)
class MemoryInfo:
    """Device memory in bytes. None means unknown."""

    free: int | None = None
    total: int | None = None
    allocated: int | None = None
    peak: int | None = None
