"""`load_backend`: from a backend's name to a device that is ready, whose answers can be."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mla_backends.api import Backend, DeviceInfo, MemoryInfo, Peak
from mla_backends.errors import BackendError
from mla_backends.registry import REPORT, open_backend

# More than any device has: bytes of memory or cache, bytes per second, FLOP per second.
MAX_BYTES, MAX_BANDWIDTH, MAX_FLOPS = 10**18, 1e18, 1e22


def load_backend(
    name: str,
    index: int | Callable[[int | None], int | None] | None = None,
    threads: int | None = None,
    options: Mapping[str, str] | None = None,
) -> Backend:
    """Find, probe and set up a backend; `backend.device` is its device afterwards.

    `index` chooses among several devices: a number, or a function that takes the number of visible devices
    (None: the backend cannot count them) and returns one; None leaves it to the stack.
    `threads` is how many host threads torch may use; a backend that sets another number is refused. Raises a
    subclass of `mla_backends.BackendError` whose text names the cause and the fix; there is no fallback.
    """
    if not isinstance(name, str):
        raise TypeError(f"load_backend() takes the name of a backend, such as 'cpu', got {name!r:.80}.")
    if isinstance(index, Mapping):
        raise TypeError(f"load_backend('{name}', options={dict(index)}): options go by name.")
    chosen = dict(options or {})
    if threads is not None:
        chosen["threads"] = str(threads)
        with contextlib.suppress(Exception):  # if torch does not import, what needs it says so, with the cure
            import torch

            torch.set_num_threads(threads)  # beforehand: a backend may do nothing with the option
    backend = open_backend(name, index, chosen)
    if threads is not None:
        _check_threads(name, threads)
    for method, fault in _faults(backend):
        said = f"{method} returned {fault}"
        raise BackendError(f"backend '{name}' cannot be used: {said}; {REPORT}.", reason=said, hint=REPORT)
    return backend


def _check_threads(name: str, threads: int) -> None:
    """Raise `BackendError` if a backend has set another number than the one that was asked for."""
    import torch

    used = torch.get_num_threads()
    if used != threads:
        asked = f"{threads} {'was' if threads == 1 else 'were'} asked for"
        raise BackendError(
            f"backend '{name}' ignores the option threads: {asked}, and after its setup() torch uses {used}; "
            "leave the option out to run on the backend's own number."
        )


def _faults(backend: Backend) -> Iterator[tuple[str, str]]:
    """Yield the method that was asked, and what is wrong with its answer: no result could hold it."""
    import torch

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
