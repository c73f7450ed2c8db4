"""What a backend says of itself once it is set up: refused here where no result could hold it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from mla_backends.api import Backend, DeviceInfo, MemoryInfo, Peak
from mla_backends.errors import BackendError
from mla_backends.registry import REPORT

# More than any device has: bytes of memory or cache, bytes per second, FLOP per second.
MAX_BYTES, MAX_BANDWIDTH, MAX_FLOPS = 10**18, 1e18, 1e22


def check_opened(name: str, backend: Backend) -> None:
    """Raise `BackendError` for the first answer of a backend that cannot be, naming `name` and the method."""
    for method, fault in _faults(backend):
        said = f"{method} returned {fault}"
        raise BackendError(f"backend '{name}' cannot be used: {said}; {REPORT}.", reason=said, hint=REPORT)


def _faults(backend: Backend) -> Iterator[tuple[str, str]]:
    """Yield the method that was asked, and what is wrong with its answer."""
    if not isinstance(backend.device, torch.device):
        yield "setup()", f"{backend.device!r}, not a torch.device"
    if not backend.name.isprintable() or not backend.name.strip():
        yield "its name", f"{backend.name!a}, not a printable text"
    try:
        info = backend.device_info()
    except Exception:  # noqa: BLE001  # told where it is used, and a check of conformance
        return
    if not isinstance(info, DeviceInfo):
        yield "device_info()", f"{info!r}, not a DeviceInfo"
    yield from (("device_info()", fault) for fault in _of_device(info))
    memory = backend.memory()
    if not isinstance(memory, MemoryInfo):
        yield "memory()", f"{memory!r}, not a MemoryInfo"
    for field in ("free", "total", "allocated", "peak"):
        if not _is_count(value := getattr(memory, field), least=0):
            yield "memory()", f"{field} {value!r}, not a number of bytes or None"
    native = backend.dtypes()
    listed = isinstance(native, (tuple, list)) and native
    if not listed or not all(isinstance(dtype, torch.dtype) for dtype in native):
        yield "dtypes()", f"{native!r}, not a tuple of torch dtypes"


def _of_device(info: DeviceInfo) -> Iterator[str]:
    if not isinstance(info.name, str) or not info.name.strip() or not info.name.isprintable():
        yield f"the name {info.name!a}, not a printable text"
    for field in ("memory_bytes", "cache_bytes"):
        if not _is_count(value := getattr(info, field), least=1):
            yield f"{field} {value!r}, not a positive number of bytes or None"
    if info.bandwidth is not None:
        yield from _of_peak("bandwidth", info.bandwidth, MAX_BANDWIDTH)
    if not isinstance(info.flops, Mapping):
        yield f"flops {info.flops!r}, not a mapping of dtype names"
        return
    for dtype, peak in info.flops.items():
        yield from _of_peak(f"flops of {dtype!a}", peak, MAX_FLOPS)


def _of_peak(field: str, peak: Any, most: float) -> Iterator[str]:
    if not isinstance(peak, Peak):
        yield f"{field} {peak!r}, not a Peak"
    elif type(peak.value) is bool or not isinstance(peak.value, (int, float)) or not 1 <= peak.value <= most:
        yield f"{field} {peak.value!r} per second, not a number from 1 to {most:g}"
    elif not isinstance(peak.source, str) or not peak.source.isprintable():
        yield f"{field} of the source {peak.source!a}, not a printable text"


def _is_count(value: Any, least: int) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value is None or (whole and least <= value <= MAX_BYTES)
