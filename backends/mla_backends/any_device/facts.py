"""What a torch module says about its device. Every function may be missing, or raise."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mla_backends import host
from mla_backends.api import DeviceInfo, MemoryInfo
from mla_backends.cuda import cuda_build
from mla_backends.discovery import entries
from mla_backends.known import KNOWN

if TYPE_CHECKING:
    import torch

EXTENSIONS = "torch.backends"  # the group of entry points that torch loads by itself


def attempt(function: Callable[..., Any] | None, *arguments: Any) -> Any:
    """Call an optional function of a stack; None if it is missing or raises."""
    try:
        return None if function is None else function(*arguments)
    except Exception:  # noqa: BLE001  # vendor stacks raise anything
        return None


def count(module: ModuleType) -> int | None:
    """Return how many devices there are; None if the module cannot say."""
    return _whole(attempt(getattr(module, "device_count", None)))


def info(module: ModuleType, device: torch.device) -> DeviceInfo:
    """Describe the device as far as its module does; the host describes a CPU."""
    if device.type == "cpu":
        return DeviceInfo(host.processor_name(), host.memory_total(), host.last_level_cache())
    found = attempt(getattr(module, "get_device_properties", None), device)
    name = getattr(found, "name", None) or attempt(getattr(module, "get_device_name", None), device)
    text = name.strip() if isinstance(name, str) else ""
    return DeviceInfo(
        name=f"{text} ({device.type})" if text else device.type,
        memory_bytes=_whole(getattr(found, "total_memory", None)) or memory(module, device).total,
        cache_bytes=_whole(getattr(found, "L2_cache_size", None)) or None,
    )


def memory(module: ModuleType, device: torch.device) -> MemoryInfo:
    """Return the counters that the module has; the host's for a CPU."""
    if device.type == "cpu":
        free, total = host.memory_available(), host.memory_total()
        return MemoryInfo(free=free, total=total, peak=host.peak_resident())

    def number(*names: str) -> int | None:
        return next((found for name in names if (found := _whole(_asked(module, name))) is not None), None)

    free, total = _free_and_total(module, device)
    allocated = number("memory_allocated", "current_allocated_memory")
    if total is None and (total := number("recommended_max_memory") or None):  # of unified memory
        held = number("driver_allocated_memory") or allocated
        free = None if held is None else max(0, total - held)
    return MemoryInfo(free=free, total=total, allocated=allocated, peak=number("max_memory_allocated"))


def _free_and_total(module: ModuleType, device: torch.device) -> tuple[int | None, int | None]:
    import torch

    newer = getattr(getattr(torch, "accelerator", None), "get_memory_info", None)  # only in a recent torch
    for function in (getattr(module, "mem_get_info", None), newer):
        found = attempt(function, device)
        if isinstance(found, tuple) and len(found) == 2 and _whole(found[1]):
            return _whole(found[0]), _whole(found[1])
    return None, None


def _asked(module: ModuleType, name: str) -> Any:
    return attempt(getattr(module, name, None))


def _whole(value: Any) -> int | None:
    """Return `value` if it is a count, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def extensions() -> dict[str, str]:
    """Return the versions of the packages that torch loads by itself."""
    points = metadata.entry_points(group=EXTENSIONS)
    return {f"extension.{point.name}": point.dist.version for point in points if point.dist is not None}


def own_backend(device_type: str) -> str:
    """Return the backend of this project that is made for the device; "" if there is none."""
    if device_type == "cuda":
        return cuda_build().backend
    return next((one.name for one in KNOWN.values() if device_type in (one.name, *one.also)), "")


def how_to_use(backend: str) -> str:
    """Return the command that chooses a backend of this project, and how to install it where it is not."""
    use = f"`--backend {backend}`"
    if any(entry.name == backend for entry in entries()):
        return use
    return f"{KNOWN[backend].install}, and {use}"
