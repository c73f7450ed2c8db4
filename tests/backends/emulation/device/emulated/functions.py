"""The functions that a torch device module has, for the emulated device."""

from __future__ import annotations

import time
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from emulated.graphs import Graph, capture
from emulated.state import STATE


class Stream:
    """Everything is done when it returns, so a stream has nothing to keep."""

    def __init__(self, device: Any = None, priority: int = 0, **rest: Any) -> None:
        self.device = torch.device(STATE.name, STATE.current)

    def synchronize(self) -> None:
        STATE.wait("stream.synchronize")

    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, Event)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: Any) -> None:
        pass


class Event:
    """A moment on the host's clock, which is the device's as well unless it is behind."""

    def __init__(self, enable_timing: bool = False, **rest: Any) -> None:
        self._timing, self._moment = enable_timing, 0.0
        self._done = -1

    def record(self, stream: Stream | None = None) -> None:
        if STATE.recording is not None:
            raise RuntimeError("operation not permitted when stream is capturing: event.record")
        self._moment = time.perf_counter()
        self._done = -1 if STATE.behind is None else STATE.done

    def query(self) -> bool:
        if STATE.recording is not None:
            raise RuntimeError("operation not permitted when stream is capturing: event.query")
        return STATE.done > self._done

    def synchronize(self) -> None:
        STATE.wait("event.synchronize")

    def elapsed_time(self, other: Event) -> float:
        if not (self._timing and other._timing and self._moment and other._moment):
            raise ValueError("both events must be made with enable_timing=True and recorded")
        return 1e3 * (other._moment - self._moment)


def _index(device: Any) -> int:
    if device is None:
        return STATE.current
    return device if isinstance(device, int) else torch.device(device).index or 0


def _set_device(device: Any) -> None:
    if not 0 <= _index(device) < STATE.count:
        raise RuntimeError(f"{STATE.name} error: invalid device ordinal")
    STATE.current = _index(device)


def _properties(device: Any = None) -> Any:
    if not 0 <= _index(device) < STATE.count:
        raise AssertionError("Invalid device id")
    card = STATE.card
    return SimpleNamespace(
        name=card.name,
        major=card.capability[0],
        minor=card.capability[1],
        multi_processor_count=56,
        total_memory=card.memory << 30,
        **dict(card.extra),
    )


def _is_bf16_supported(including_emulation: bool = True) -> bool:
    return including_emulation or STATE.card.claims_bfloat16


def _sleep(cycles: int) -> None:
    """Keep the device busy, and the host as well unless the device is behind: it calls no operator."""
    if STATE.recording is not None:
        raise RuntimeError("a wait on the host's clock cannot be captured")
    end = time.perf_counter() + cycles / 2e9
    while STATE.behind is None and time.perf_counter() < end:
        pass


class _DeviceGuard:
    """Context manager that makes another card current."""

    def __init__(self, device: Any) -> None:
        self._wanted, self._before = _index(device), STATE.current

    def __enter__(self) -> None:
        self._before = STATE.current
        _set_device(self._wanted)

    def __exit__(self, *error: Any) -> None:
        STATE.current = self._before


def make_module() -> ModuleType:
    """Return a module with what both torch.cuda and vendors' modules offer."""
    module = ModuleType(f"torch.{STATE.name}")
    total = STATE.card.memory << 30
    functions: dict[str, Any] = {
        "is_available": lambda: STATE.count > 0,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": lambda: None,
        "device_count": lambda: STATE.count,
        "current_device": lambda: STATE.current,
        "set_device": _set_device,
        "synchronize": lambda device=None: STATE.wait("synchronize"),
        "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: STATE.allocated,
        "max_memory_allocated": lambda device=None: STATE.peak,
        "reset_peak_memory_stats": lambda device=None: setattr(STATE, "peak", STATE.allocated),
        "mem_get_info": lambda device=None: (total - STATE.allocated, total),
        "get_device_properties": _properties,
        "get_device_name": lambda device=None: STATE.card.name,
        "get_device_capability": lambda device=None: STATE.card.capability,
        "is_bf16_supported": _is_bf16_supported,
        "is_current_stream_capturing": lambda: STATE.recording is not None,
        "current_stream": lambda device=None: Stream(),
        "default_stream": lambda device=None: Stream(),
        "stream": lambda stream: stream,
        "_sleep": _sleep,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
    }
    classes = {"Stream": Stream, "Event": Event, "device": _DeviceGuard, "graph": capture}
    classes[f"{STATE.name.upper()}Graph"] = Graph
    for name, value in {**functions, **classes}.items():
        setattr(module, name, value)
    return module
