"""The memory of a scenario, before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import NamedTuple

from mla.bench.measure.setup import sweep
from mla.bench.subjects.fixture import Fixture, Needs
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
    host: int  # weights, inputs, and the oracle in float64, once for all implementations
    outputs: int  # of a pass of one implementation, on the host
    implementations: int
    references: int  # copies of the layer that live for a while next to the implementations
    per_reference: int  # on the device
    device_available: int | None
    host_available: int | None
    shared: bool  # the device is the host
    shared_weights: int = 0  # bytes that all implementations together need once between them
    shared_alone: int = 0  # the same for any single one and the reference
    sweep: int = 0  # bytes that are read and written before a cold forward
    gathered: int = 1  # copies of the outputs that are being checked
    others: int = 0  # further ranks on this host
    per_other: int = 0  # what each holds there, apart from what is on its device

    @property
    def side_by_side(self) -> bool:
        """Whether all implementations fit at once, so that they can alternate."""
        return self._fits(self.implementations)

    def _fits(self, count: int) -> bool:
        device, on_host = self.device_bytes(count), self.host_bytes(count)
        if self.shared:
            return _within(device + on_host, self.host_available)
        return _within(device, self.device_available) and _within(on_host, self.host_available)

    def device_bytes(self, count: int) -> int:
        """Return what `count` implementations need on the device."""
        saved = self.shared_weights if count == self.implementations else self.shared_alone
        held = count * self.per_implementation + self.references * self.per_reference
        return held - saved + self.sweep

    def host_bytes(self, count: int) -> int:
        """Return what the host needs while `count` implementations are measured, for all ranks that it has.

        The outputs of the checked pass stay until all implementations are compared; those of the last pass
        are there as well.
        """
        outputs = (self.implementations + count * self.gathered) * self.outputs
        other = self.per_other + (count * self.per_implementation if self.shared else 0)
        return self.host + outputs + self.others * other

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
        device, on_host = self.device_bytes(1), self.host_bytes(1)
        need = f"{gib(device)} on the device and {gib(on_host)} on the host"
        available = f"{gib(self.device_available)} and {gib(self.host_available)}"
        if self.shared:
            need, available = f"{gib(device + on_host)}, which are {need}", gib(self.host_available)
        return f"about {need}; available are {available}"


def _within(need: int, available: int | None) -> bool:
    return available is None or need <= available


def gib(count: int | None) -> str:
    """Return bytes in GiB, or "an unknown amount"."""
    exact = None if count is None else Decimal(count)  # mistyped lengths overflow a float
    return size(exact, "an unknown amount", GiB=lambda gibs: format(gibs, ".2f" if gibs < 10**6 else ".1e"))


def plan_memory(
    fixture: Fixture, needs: Needs, names: Sequence[str], fused: bool, available: Available, cold: bool
) -> MemoryPlan:
    """Return a scenario's needs next to the memory that is available; `fused`: some of `names` are.

    `cold`: forwards are also timed after the caches were flushed.
    """
    return MemoryPlan(
        per_implementation=needs.device_bytes,
        host=needs.host_bytes,
        outputs=needs.output_bytes,
        implementations=len(names),
        references=1 if fused and needs.reference_bytes else 0,
        per_reference=needs.reference_bytes,
        device_available=available.device,
        host_available=available.host,
        shared=fixture.setting.device.type == "cpu",
        shared_weights=fixture.shared_bytes(names, fused),
        shared_alone=min(fixture.shared_bytes([name], fused) for name in names),
        sweep=sweep(fixture.setting.backend).bytes if cold else 0,
        gathered=needs.gathered,
        others=fixture.setting.beside,
        per_other=needs.other_bytes,
    )
