"""What a forward takes: time of the model and of its attention layers alone, and memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mla.errors import MLAError
from mla_backends.api import Backend

_PROC = Path("/proc/self")


class Sample(NamedTuple):
    """One forward."""

    model_ms: float
    attention_ms: float
    attended: torch.Tensor  # the first attention layer's output for each request's last token, [b, hidden]


class Clock:
    """Times forwards of a model and of its attention layers, with the processor's caches flushed before."""

    def __init__(self, model: Any, backend: Backend, flush: Callable[[], None]) -> None:
        self._model, self._synchronize, self._flush = model, backend.synchronize, flush
        self._attention, self._start = 0.0, 0.0
        self._attended = torch.empty(0)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Watch the attention layers, by hooks, until the end of the block."""
        layers = [layer.self_attn for layer in self._model.model.layers]
        hooks = [layer.register_forward_pre_hook(self._enter) for layer in layers]
        hooks += [layer.register_forward_hook(self._leave) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, *_: Any) -> None:
        self._synchronize()
        self._start = time.perf_counter()

    def _leave(self, _: Any, __: Any, output: Any) -> None:
        self._synchronize()
        self._attention += time.perf_counter() - self._start
        self._attended = output[0]

    @torch.no_grad()
    def forward(self, **arguments: Any) -> Sample:
        """Run one forward of the whole model, for the last logits."""
        self._flush()
        self._attention = 0.0
        self._synchronize()
        start = time.perf_counter()
        self._model(**arguments, use_cache=True, logits_to_keep=1)
        self._synchronize()
        took = time.perf_counter() - start
        return Sample(1e3 * took, 1e3 * self._attention, self._attended[:, -1].float())


class NoMeter(MLAError):
    """The host does not say what memory a process takes."""


def require_meter(device: torch.device) -> None:
    """Raise `NoMeter` where `Memory` cannot work: Linux resets a peak, and glibc gives memory back."""
    if device.type == "cpu" and not (_resettable() and hasattr(ctypes.CDLL(None), "malloc_trim")):
        raise NoMeter(
            f"on the host, this needs Linux with glibc, for the memory of a forward; this is {sys.platform}."
        )


def _resettable() -> bool:
    return os.access(_PROC / "clear_refs", os.W_OK)


class Memory:
    """Bytes of a device, or of this process on the host."""

    def __init__(self, device: torch.device) -> None:
        self._device: Any = None if device.type == "cpu" else getattr(torch, device.type)

    def in_use(self) -> int:
        """Return what is in use now; what nobody refers to is freed, and given back, before."""
        gc.collect()
        if self._device is not None:
            return int(self._device.memory_allocated())
        ctypes.CDLL(None).malloc_trim(0)
        return self._status("VmRSS")

    @contextlib.contextmanager
    def peak(self) -> Iterator[list[int]]:
        """Append to the list how much more was in use in the block, at most, than at its beginning."""
        before, found = self.in_use(), list[int]()
        if self._device is not None:
            self._device.reset_peak_memory_stats()
        else:
            (_PROC / "clear_refs").write_text("5")  # the peak is from now on
        yield found
        most = self._device.max_memory_allocated() if self._device is not None else self._status("VmHWM")
        found.append(max(0, int(most) - before))

    @staticmethod
    def _status(name: str) -> int:
        """Return a line of the process's status, which is in KiB."""
        found = re.search(rf"^{name}:\s*(\d+) kB$", (_PROC / "status").read_text(), re.MULTILINE)
        assert found is not None
        return 1024 * int(found[1])
