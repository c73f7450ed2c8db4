"""Honest backends that look like opponents: their numbers must stand."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from mla_backends.api import Timer
from opponents.base import Call, Opponent


class Noisy(Opponent):
    """Some calls take longer, at random; `rare` ones much longer, as on a machine that does other work."""

    def __init__(self, ms: float, rare: float = 0.0, **given: Any) -> None:
        super().__init__(**given)
        self._ms, self._rare, self._random = ms, rare, random.Random(1)

    def call(self, call: Call) -> None:
        call.make()
        if call.is_last:
            time.sleep(self._random.random() * self._ms / 1e3)
            if self._random.random() < 0.02:
                time.sleep(self._rare / 1e3)


class Threads(Opponent):
    """Some calls are split over threads, and finished before they return."""

    def __init__(self, count: int, **given: Any) -> None:
        super().__init__(**given)
        self._pool = ThreadPoolExecutor(count)
        self._count = count
        self.patches.callback(self._pool.shutdown)

    def call(self, call: Call) -> None:
        rows = call.operand.shape[0] if call.kind == "linear" else 0
        if rows < self._count:
            call.make()
            return
        part = -(-rows // self._count)
        list(self._pool.map(lambda start: self._part(call, slice(start, start + part)), range(0, rows, part)))

    def _part(self, call: Call, rows: slice) -> None:
        with torch.no_grad():
            call.make_rows(rows)


class Polls(Opponent):
    """`synchronize` looks every `ms` whether its own work is done, which it never is at the first look.

    `spins`: it burns a processor until then, as a wait that does not sleep. `events`: there is a device
    clock, which counts until the work is done, and waits for it in the same way.
    """

    def __init__(self, ms: float, spins: bool = False, events: bool = False, **given: Any) -> None:
        super().__init__(**given)
        self._ms, self._spins, self._events, self._pending = ms, spins, events, False
        self.done_ns = 0

    def device_timer(self) -> Timer | None:
        return Events(self) if self._events else None

    def call(self, call: Call) -> None:
        call.make()
        self._pending, self.done_ns = True, time.perf_counter_ns()

    def synchronize(self) -> None:
        end = time.perf_counter() + self._ms / 1e3
        while self._pending and self._spins and time.perf_counter() < end:
            pass
        if self._pending and not self._spins:
            time.sleep(self._ms / 1e3)
        self._pending = False


class Events:
    """Counts from its start until the last call is done, and waits for that."""

    clock = "device"

    def __init__(self, backend: Polls) -> None:
        self._backend = backend

    def start(self) -> None:
        self._backend.synchronize()
        self._start = time.perf_counter_ns()

    def stop(self) -> float:
        self._backend.synchronize()
        return max(self._backend.done_ns - self._start, 1_000) / 1e6


class Compiles(Opponent):
    """The first calls of every op are slow, as kernels that are compiled at first use are."""

    def __init__(self, ms: float, calls: int, **given: Any) -> None:
        super().__init__(**given)
        self._ms, self._calls = ms, calls
        self._seen: dict[Any, int] = {}

    def call(self, call: Call) -> None:
        key = (call.kind, *(call.leading if call.kind == "linear" else ()))
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] <= self._calls:
            time.sleep(self._ms / 1e3)
        call.make()


class Rounds(Opponent):
    """Computes in an order of its own: results differ in the last bits from call to call."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self._random = torch.Generator().manual_seed(1)

    def call(self, call: Call) -> None:
        call.make()
        if call.out is not None and call.kind.endswith("linear"):
            noise = torch.rand(call.out.shape, generator=self._random) - 0.5
            call.out.mul_(1 + 1e-7 * noise)
