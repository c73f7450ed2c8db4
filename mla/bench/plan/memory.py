"""Work out the memory of a scenario before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from mla.bench.subjects.memory import _device_bytes, _host_bytes
from mla.bench.subjects.setting import Setting, scenario_setting
from mla.bench.workload.grid import Point
from mla.errors import OutOfMemory
from mla.text import size
from mla_backends import host


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes a scenario needs, and whether its implementations fit side by side."""

    per_implementation: int  # on the device
    host: int  # weights, inputs, and the oracle in float64
    implementations: int
    extra: int
    device_available: int | None
    host_available: int | None
    shared: bool  # the device is the host

    @property
    def side_by_side(self) -> bool:
        """Say whether all implementations fit at once, so that they can alternate."""
        return self._fits(self.implementations)

    def _fits(self, count: int) -> bool:
        device, on_host = self.device_bytes(count), self.host
        if self.shared:
            return _within(device + on_host, self.host_available)
        return _within(device, self.device_available) and _within(on_host, self.host_available)

    def device_bytes(self, count: int) -> int:
        """Return what `count` implementations need on the device."""
        return (count + self.extra) * self.per_implementation

    @property
    def fits(self) -> bool:
        """Say whether at least one implementation fits."""
        return self._fits(1)

    def require(self) -> None:
        """Raise `OutOfMemory` when not even one implementation fits."""
        if not self.fits:
            raise OutOfMemory(
                f"this run needs {self.shortage()}: use fewer requests, shorter histories or a smaller "
                "config."
            )

    def shortage(self) -> str:
        """Return what one implementation needs and what there is, as a clause."""
        device = self.device_bytes(1)
        need = f"{gib(device)} on the device and {gib(self.host)} on the host"
        available = f"{gib(self.device_available)} and {gib(self.host_available)}"
        if self.shared:
            need, available = f"{gib(device + self.host)}, which are {need}", gib(self.host_available)
        return f"about {need}; available are {available}"


def _within(need: int, available: int | None) -> bool:
    return available is None or need <= available


def gib(count: int | None) -> str:
    """Return bytes in GiB, or "an unknown amount"."""
    exact = None if count is None else Decimal(count)  # mistyped lengths overflow a float
    return size(exact, "an unknown amount", GiB=lambda gibs: format(gibs, ".2f" if gibs < 10**6 else ".1e"))


def plan_memory(setting: Setting, scenario: Point, implementations: int, extra: int = 0) -> MemoryPlan:
    """Estimate a scenario's needs from lengths alone; `extra` layers live for a while beside."""
    own = scenario_setting(setting, scenario)
    return MemoryPlan(
        per_implementation=_device_bytes(own, scenario),
        host=_host_bytes(own, scenario),
        implementations=implementations,
        extra=extra,
        device_available=setting.backend.memory().free,
        host_available=host.memory_available(),
        shared=setting.device.type == "cpu",
    )
