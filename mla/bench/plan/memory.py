"""The memory of a scenario, before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import Decimal
from typing import NamedTuple

from mla.bench.subjects.fixture import Needs
from mla.bench.subjects.setting import Setting
from mla.errors import OutOfMemory
from mla.text import size
from mla_backends import host
from mla_backends.api import Backend


class Available(NamedTuple):
    """Free memory in bytes; None where it is unknown."""

    device: int | None
    host: int | None


def available_memory(backend: Backend) -> Available:
    """Return the memory that is free now."""
    return Available(backend.memory().free, host.memory_available())


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes a scenario needs, and whether its implementations fit side by side."""

    per_implementation: int  # on the device
    host: int  # weights, inputs, and the oracle in float64
    implementations: int
    references: int  # copies of the layer that live for a while next to the implementations
    device_available: int | None
    host_available: int | None
    shared: bool  # the device is the host

    @property
    def side_by_side(self) -> bool:
        """Whether all implementations fit at once, so that they can alternate."""
        return self._fits(self.implementations)

    def _fits(self, count: int) -> bool:
        device, on_host = self.device_bytes(count), self.host
        if self.shared:
            return _within(device + on_host, self.host_available)
        return _within(device, self.device_available) and _within(on_host, self.host_available)

    def device_bytes(self, count: int) -> int:
        """Return what `count` implementations need on the device."""
        return (count + self.references) * self.per_implementation

    @property
    def fits(self) -> bool:
        """Whether at least one implementation fits."""
        return self._fits(1)

    def with_available(self, available: Available) -> MemoryPlan:
        """Return the same needs next to what is available now."""
        return replace(self, device_available=available.device, host_available=available.host)

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


def plan_memory(
    setting: Setting, needs: Needs, implementations: int, references: int, available: Available
) -> MemoryPlan:
    """Return a scenario's needs next to the memory that is available."""
    return MemoryPlan(
        per_implementation=needs.device_bytes,
        host=needs.host_bytes,
        implementations=implementations,
        references=references,
        device_available=available.device,
        host_available=available.host,
        shared=setting.device.type == "cpu",
    )
