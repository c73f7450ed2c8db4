"""Work that is queued and finished later than the backend says, and a device's clock that lies."""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

import torch

from mla_backends.api import HostTimer, Timer
from opponents.base import Call, Opponent

Waits = Callable[["Queue"], bool]

# When `synchronize` waits. A region is start (nothing was submitted since the last call) and stop.
WAITS: dict[str, Waits] = {
    "always": lambda queue: True,
    "at a start": lambda queue: queue.submitted == 0,
    "never": lambda queue: False,
    "every 2nd stop": lambda queue: queue.submitted == 0 or queue.stops % 2 == 0,
    "every 5th stop": lambda queue: queue.submitted == 0 or queue.stops % 5 == 0,
    "4 stops of 5": lambda queue: queue.submitted == 0 or queue.stops % 5 != 0,
    "when a pass begins": lambda queue: queue.backend.steps == 0 and queue.submitted == 0,
}

# Methods that copy a tensor to the host, which wait for the device on a real one.
COPIES = ("cpu", "to", "copy_", "clone", "numpy", "double")


class Queue:
    """Calls that another thread makes in their order."""

    def __init__(self, backend: Opponent) -> None:
        self.backend = backend
        self._pool = ThreadPoolExecutor(1)
        self._pending: deque[Future[None]] = deque()
        self.submitted = 0  # since the last synchronize
        self.stops = 0

    def submit(self, work: Callable[[], None]) -> None:
        """Queue work."""
        self.submitted += 1
        self._pending.append(self._pool.submit(torch.no_grad()(work)))

    def drain(self) -> int:
        """Wait for everything; return how many calls were not finished."""
        unfinished = sum(not future.done() for future in self._pending)
        while self._pending:
            self._pending.popleft().result()
        return unfinished

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown()


class Late(Opponent):
    """Queues every call; `waits` says when `synchronize` waits, `copies` which methods of Tensor do.

    `finishes`: the last call of a forward waits, too.
    """

    def __init__(self, waits: str, copies: Sequence[str] = (), finishes: bool = False, **given: Any) -> None:
        super().__init__(**given)
        self.queue, self._waits, self._copies = Queue(self), WAITS[waits], copies
        self._finishes = finishes

    def arrives(self) -> None:
        self.patches.callback(self.queue.close)
        self.patches.callback(self.queue.drain)
        for name in self._copies:
            self.patches.enter_context(patch.object(torch.Tensor, name, _waiting(name, self.queue)))

    def call(self, call: Call) -> None:
        self.queue.submit(call.make)
        if self._finishes and call.is_last:
            self.queue.drain()

    def synchronize(self) -> None:
        queue = self.queue
        queue.stops += queue.submitted > 0
        if self._waits(queue):
            late = queue.drain()
            self.gains += late > 0 and queue.submitted == 0
        queue.submitted = 0


def _waiting(name: str, queue: Queue) -> Callable[..., Any]:
    right, main = getattr(torch.Tensor, name), threading.main_thread()

    @functools.wraps(right)
    def method(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is main:
            queue.backend.gains += queue.drain() > 0
        return right(tensor, *args, **kwargs)

    return method


class HastyTimer:
    """Reads the clock first and waits then."""

    clock = "device"

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def start(self) -> None:
        self._queue.drain()
        self._start = time.perf_counter_ns()

    def stop(self) -> float:
        taken = (time.perf_counter_ns() - self._start) / 1e6
        self._queue.drain()
        return taken


class HastyClock(Late):
    """Waits honestly in `synchronize`, and not in its device's timer."""

    def __init__(self, **given: Any) -> None:
        super().__init__("always", **given)

    def device_timer(self) -> Timer | None:
        return HastyTimer(self.queue)


# What a clock does to a millisecond.
LIES: dict[str, Callable[[float], float]] = {
    "divides by 10": lambda ms: ms / 10,
    "divides by 3": lambda ms: ms / 3,
    "says 0.69 of it": lambda ms: 0.69 * ms,
    "multiplies by 10": lambda ms: ms * 10,
    "constant": lambda ms: 0.05,
    "tells the truth": lambda ms: ms,
}


class Liar(HostTimer):
    """A timer that changes what it read."""

    def __init__(self, synchronize: Callable[[], None], lie: str, clock: str) -> None:
        super().__init__(synchronize)
        self._lie, self.clock = LIES[lie], clock

    def stop(self) -> float:
        return self._lie(super().stop())


class LyingTimer(Opponent):
    """Its device's timer lies."""

    def __init__(self, device: str, **given: Any) -> None:
        super().__init__(**given)
        self._device = device

    def device_timer(self) -> Timer | None:
        return Liar(self.synchronize, self._device, "device")
