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
    if threads is not None and (used := torch.get_num_threads()) != threads:
        asked = f"{threads} {'was' if threads == 1 else 'were'} asked for"
        raise BackendError(
            f"backend '{name}' ignores the option threads: {asked}, and after its setup() torch uses {used}; "
            "leave the option out to run on the backend's own number."
        )
    for method, what, answer, fits, due in _answers(backend):
        if not fits:
            said = f"{method} returned {f'{what} {answer!a}'.strip()}, not {due}"
            raise BackendError(
                f"backend '{name}' cannot be used: {said}; {REPORT}.", reason=said, hint=REPORT
            )
    return backend


def _answers(backend: Backend) -> Iterator[tuple[str, str, Any, bool, str]]:
    """Yield what a backend answers: method, part, answer, whether a result could hold it, and what is due."""
    import torch

    device = backend.device
    yield "setup()", "", device, isinstance(device, torch.device), "a torch.device"
    yield "its name", "", backend.name, _is_text(backend.name), "a printable text"
    try:
        info = backend.device_info()
    except Exception:  # noqa: BLE001  # told where it is used, and a check of conformance
        return
    of = "device_info()"
    yield of, "", info, isinstance(info, DeviceInfo), "a DeviceInfo"
    yield of, "the name", info.name, _is_text(info.name), "a printable text"
    for field in ("memory_bytes", "cache_bytes"):
        value = getattr(info, field)
        yield of, field, value, _is_count(value, least=1), "a positive number of bytes or None"
    yield of, "flops", info.flops, isinstance(info.flops, Mapping), "a mapping of dtype names"
    peaks = [(f"flops of {dtype!a}", peak, MAX_FLOPS) for dtype, peak in info.flops.items()]
    peaks += [("bandwidth", info.bandwidth, MAX_BANDWIDTH)] if info.bandwidth is not None else []
    for field, peak, most in peaks:
        yield of, field, peak, isinstance(peak, Peak), "a Peak"
        a_number = isinstance(peak.value, (int, float)) and type(peak.value) is not bool
        fits = a_number and 1 <= peak.value <= most
        yield of, f"{field} per second", peak.value, fits, f"a number from 1 to {most:g}"
        source = isinstance(peak.source, str) and peak.source.isprintable()
        yield of, f"{field} of the source", peak.source, source, "a printable text"
    memory = backend.memory()
    yield "memory()", "", memory, isinstance(memory, MemoryInfo), "a MemoryInfo"
    for field in ("free", "total", "allocated", "peak"):
        value = getattr(memory, field)
        yield "memory()", field, value, _is_count(value, least=0), "a number of bytes or None"
    native = backend.dtypes()
    listed = isinstance(native, (tuple, list)) and native
    fits = bool(listed) and all(isinstance(dtype, torch.dtype) for dtype in native)
    yield "dtypes()", "", native, fits, "a tuple of torch dtypes"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and bool(value.strip())


def _is_count(value: Any, least: int) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value is None or (whole and least <= value <= MAX_BYTES)
