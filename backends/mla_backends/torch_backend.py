"""The optional part of `Backend`, implemented through a device's own torch module.

Works from `getattr(torch, device_type)` and never from `torch.accelerator`, which several vendor builds
lack or leave incomplete. A CUDA-like plugin is a name, a device type and a probe.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mla_backends.api import Availability, Backend, DeviceInfo, MemoryInfo
from mla_backends.errors import BackendError

if TYPE_CHECKING:
    import torch


class TorchBackend(Backend):
    """A device that torch already knows, as `torch.<device_type>`."""

    device_type: str
    requires: tuple[str, ...] = ()  # modules whose import registers the device with torch
    install_hint = "install the torch build of the device's vendor"

    @functools.cached_property
    def module(self) -> ModuleType:
        """Return `torch.<device_type>`. Raises AttributeError where torch does not know the device."""
        import torch

        for name in self.requires:
            importlib.import_module(name)
        module: ModuleType = getattr(torch, self.device_type)
        return module

    def probe(self) -> Availability:
        """Ask the device's torch module; a subclass that shares a device type must exclude the others."""
        try:
            available = self.module.is_available()
        except Exception as error:  # noqa: BLE001  # vendor stacks raise anything, and a probe must not
            return Availability(
                False, f"torch.{self.device_type} cannot be used ({error})", self.install_hint
            )
        if not available:
            reason = f"torch.{self.device_type}.is_available() is False"
            return Availability(False, reason, "check the driver and the visible-devices variable")
        return Availability(True, evidence={f"torch.{self.device_type}": "available"})

    def setup(self, index: int | None = None) -> torch.device:
        import torch

        self.set_threads()
        count = self.module.device_count()
        if index is not None and not 0 <= index < count:
            raise BackendError(f"backend '{self.name}' has {count} device(s), so there is no device {index}.")
        if index is not None:
            self.module.set_device(index)
        return torch.empty(0, device=self.device_type).device

    def set_threads(self) -> None:
        """Apply the `threads` option: how many host threads torch may use."""
        if "threads" in self.options:
            import torch

            torch.set_num_threads(int(self.options["threads"]))

    def synchronize(self) -> None:
        self.module.synchronize()

    def device_info(self) -> DeviceInfo:
        if not hasattr(self.module, "get_device_properties"):
            return DeviceInfo(name=self.device_type)
        properties = self.module.get_device_properties(self.device)
        return DeviceInfo(
            name=str(properties.name),
            memory_bytes=_known(properties, "total_memory"),
            cache_bytes=_known(properties, "L2_cache_size"),
        )

    def memory(self) -> MemoryInfo:
        free, total = _call(self.module, "mem_get_info") or (None, None)
        return MemoryInfo(
            free=free,
            total=total,
            allocated=_call(self.module, "memory_allocated"),
            peak=_call(self.module, "max_memory_allocated"),
        )

    def empty_cache(self) -> None:
        _call(self.module, "empty_cache")

    def environment(self) -> Mapping[str, str]:
        return {
            name: str(getattr(importlib.import_module(name), "__version__", "?")) for name in self.requires
        }


def _known(properties: Any, name: str) -> int | None:
    value = getattr(properties, name, None)
    return int(value) if value else None


def _call(module: ModuleType, name: str) -> Any:
    """Call an optional function of the device module; None where it does not exist."""
    function = getattr(module, name, None)
    return function() if function is not None else None
