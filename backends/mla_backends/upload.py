"""`upload`: host tables to the device without waiting for it.

An asynchronous copy may read host memory long after the call that asked for it has returned, so what it reads
must stay as it is until then. Not every driver copies pageable memory aside first, as CUDA's does, and memory
that was freed in the meantime would give wrong tables now and then. Every copy therefore starts from memory
of this module: a few slots per device and size, pinned where the stack can, each with an event behind its
last copy. A slot is written again only once its event has passed; while none has, there is one slot more, so
the host never waits.
"""

from __future__ import annotations

from array import array
from collections import defaultdict, deque
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from mla_backends.torch_backend import capturing

if TYPE_CHECKING:
    import torch

LEAST_SLOT_BYTES = 4096  # others are the next powers of two


def integers(values: Iterable[int], *, wide: bool = False) -> torch.Tensor:
    """Return a host tensor [n] of int32, or of int64 if `wide`."""
    import torch

    buffer, dtype = array("q" if wide else "i", values), torch.int64 if wide else torch.int32
    return torch.frombuffer(buffer, dtype=dtype) if buffer else torch.empty(0, dtype=dtype, device="cpu")


def upload(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the numbers of `host` on `device`. The copy may still be under way when this returns.

    `host` may be freed or overwritten at once, except on the CPU, where the result is `host` itself.
    """
    if device.type == "cpu":
        return host
    import torch

    target = torch.empty(host.shape, dtype=host.dtype, device=device)
    upload_into(host, target)
    return target


def upload_into(host: torch.Tensor, target: torch.Tensor) -> None:
    """Copy `host` into `target` [same shape, same dtype], which may be on any device.

    The copy may still be under way when this returns; `host` may be freed or overwritten at once. A copy that
    is captured into a graph keeps its own memory for as long as the process lives: a replay reads it again.
    """
    if target.device.type == "cpu" or host.numel() == 0:
        target.copy_(host)
    else:
        _ring(target.device).send(host, target)


class _Ring:
    """Host memory of one device's copies, by size, each with an event; those sent first in front."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._device = device
        self._module: Any = getattr(torch, device.type, None)
        self._slots: defaultdict[int, deque[tuple[torch.Tensor, Any]]] = defaultdict(deque)
        self._captured: list[torch.Tensor] = []
        try:
            self._has_events = callable(self._module.Event().query)  # type: ignore[union-attr]
        except Exception:  # noqa: BLE001  # stacks lack events in different ways
            self._has_events = False

    def send(self, host: torch.Tensor, target: torch.Tensor) -> None:
        """Copy `host` to `target`, from a slot; where the stack has no events, wait for the copy."""
        size = max(LEAST_SLOT_BYTES, 1 << (host.nbytes - 1).bit_length())
        if capturing(self._device):
            memory = _host_memory(size)
            self._captured.append(memory)
            target.copy_(_filled(memory, host), non_blocking=True)
        elif not self._has_events:
            target.copy_(host)
        else:
            memory, event = self._free(size)
            target.copy_(_filled(memory, host), non_blocking=True)
            # The stream that copies to this device are in need not be the current device's.
            current = getattr(self._module, "current_stream", None)
            event.record(*(() if current is None else (current(self._device),)))
            self._slots[size].append((memory, event))

    def _free(self, size: int) -> tuple[torch.Tensor, Any]:
        """Take the slot that was sent first if it has arrived, else make one. No other thread can take it."""
        waiting = self._slots[size]
        with suppress(IndexError):
            memory, event = waiting.popleft()
            if event.query():
                return memory, event
            waiting.appendleft((memory, event))
        return _host_memory(size), self._module.Event()


def _filled(memory: torch.Tensor, host: torch.Tensor) -> torch.Tensor:
    """Return a copy of `host` in this memory."""
    return memory[: host.nbytes].view(host.dtype).view(host.shape).copy_(host)


_RINGS: dict[torch.device, _Ring] = {}


def _ring(device: torch.device) -> _Ring:
    ring = _RINGS.get(device)
    return ring if ring is not None else _RINGS.setdefault(device, _Ring(device))


def _host_memory(size: int) -> torch.Tensor:
    """Return bytes of host memory, pinned where torch can pin for its accelerator."""
    import torch

    with torch.inference_mode(False):  # a tensor made in that mode cannot be written outside it
        try:
            return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
        except (RuntimeError, NotImplementedError, AssertionError):  # what a stack without it raises
            return torch.empty(size, dtype=torch.uint8, device="cpu")
