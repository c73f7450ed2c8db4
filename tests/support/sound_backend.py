"""A backend that passes the suite with whatever ops it is given, and a device that is only imagined.

The CPU stands in for every device. `Asynchronous` gives it a queue, so that what does not wait shows, and
`Tape` a graph that really replays: recorded operations on the same memory, without the host's code.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mla_backends.api import HostTimer, MemoryInfo
from mla_backends.testing import HostBackend


class Sound(HostBackend):
    """The CPU, as right as can be: it has graphs and a memory counter, and whatever ops it is given."""

    name = "sound"

    def synchronize(self) -> None:
        Asynchronous.wait()

    def timer(self) -> HostTimer:
        return HostTimer(self.synchronize)

    def memory(self) -> MemoryInfo:
        used = Allocated.bytes
        return MemoryInfo(allocated=used, peak=used, free=1 << 40, total=1 << 41)

    def graph(self, fn: Callable[[], None]) -> Callable[[], None] | None:
        return Tape.capture(fn)


class Allocated(TorchDispatchMode):
    """Counts bytes of what `torch.zeros` makes, as a device's allocator would."""

    bytes: int | None = None  # None: nobody counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.zeros.default:
            Allocated.bytes = (Allocated.bytes or 0) + made.nbytes
        return made


class Asynchronous(TorchDispatchMode):
    """A device with a queue: a product takes 3 ms of its time, and reading a tensor waits for the queue.

    The queue moves only while somebody waits, so that what a test sees does not depend on a busy host.
    """

    PRODUCT_SECONDS = 3e-3
    queued = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.out:
            Asynchronous.queued += self.PRODUCT_SECONDS
        elif func is torch.ops.aten._to_copy.default:
            self.wait()
        return func(*args, **(kwargs or {}))

    @classmethod
    def wait(cls) -> None:
        time.sleep(cls.queued)
        cls.queued = 0.0


class Tape(TorchDispatchMode):
    """Records operations and repeats them on the same tensors; host code does not run again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("the device was waited for during capture")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @classmethod
    def capture(cls, fn: Callable[[], None]) -> Callable[[], None]:
        tape = cls()
        with tape:
            fn()
        return tape.replay

    def replay(self) -> None:
        for func, args, kwargs, recorded in self.calls:
            fresh = func(*args, **kwargs)
            given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
            for old, new in zip(_tensors(recorded), _tensors(fresh), strict=True):
                if old.untyped_storage().data_ptr() not in given:  # neither a view nor written in place
                    old.copy_(new)


def _tensors(nested: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in torch.utils._pytree.tree_leaves(nested) if torch.is_tensor(leaf))
