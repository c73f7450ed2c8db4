"""What the device reaches at best, measured on the spot where the backend knows no peak.

A ceiling is the fastest of many repetitions over several ways to do the same work: torch's own operations and
the layer's projections. Reading is measured over as many bytes as a forward moves, because a footprint that
fits a cache is read several times faster than one that does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping

import torch

from mla.bench import results
from mla.bench.implementations import Setting
from mla.ops import choose
from mla_backends.api import LinearSpec, Peak

#: Seconds that one way of doing the work is repeated, and how often at least.
SECONDS, REPEATS = 0.05, 3
#: Sides of the matrices whose product is timed: larger ones only while one takes less than LONG seconds.
SIDES, LONG = (1024, 2048, 4096, 8192), 5e-3
#: Bytes read at most: more than any cache holds, and a long context must not ask for its size a second time.
MOST_BYTES = 512 << 20
#: Features of the weight that is streamed: a whole number of register blocks of any kernel.
FEATURES = 2048

Ways = Mapping[str, Callable[[], object]]


#: What was measured in this process, by everything it depends on.
_MEASURED: dict[Hashable, Peak] = {}


class Ceilings:
    """Ceilings of one setting, each measured at most once in a process."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._info = setting.backend.device_info()
        names = (setting.backend.name, setting.device, setting.dtype, setting.ops, torch.get_num_threads())
        self._key = (*names, tuple(setting.backend.ops()))

    def roofline(self, cost: results.Cost, latency_ms: float) -> results.Roofline:
        """Return how near a latency is to the larger of both floors; nothing where one cannot be known."""
        try:
            bandwidth, flops = self.bandwidth(cost.bytes), self.flops()
        except Exception:  # noqa: BLE001  # a device that cannot run the yardstick must not cost the numbers
            return results.Roofline()
        memory, compute = 1e3 * cost.bytes / bandwidth.value, 1e3 * cost.flops / flops.value
        floor = max(memory, compute)
        return results.Roofline(
            floor_ms=floor,
            fraction=floor / latency_ms,
            bound="memory" if memory >= compute else "compute",
            peak_source=bandwidth.source if memory >= compute else flops.source,
        )

    def flops(self) -> Peak:
        """Return FLOP per second of dense products in the run's dtype: declared, else measured."""
        declared = self._info.flops.get(str(self._setting.dtype).removeprefix("torch."))
        return declared or self._once("flops", self._fastest_product)

    def bandwidth(self, count: int) -> Peak:
        """Return bytes per second of reading about `count` bytes: declared, else measured."""
        rows = max(16, min(count, MOST_BYTES) // (FEATURES * self._setting.dtype.itemsize) // 16 * 16)
        return self._info.bandwidth or self._once(rows, lambda: self._fastest_read(rows))

    def _once(self, what: Hashable, measure: Callable[[], Peak]) -> Peak:
        key = (*self._key, what)
        if key not in _MEASURED:
            _MEASURED[key] = measure()
        return _MEASURED[key]

    def _fastest_product(self) -> Peak:
        best = Peak(0.0, "")
        for side in SIDES:
            seconds, way = self._best(self._products(side))
            if 2 * side**3 / seconds > best.value:
                work = f"{side} x {side} x {side} {self._setting.dtype}"
                best = Peak(2 * side**3 / seconds, f"measured: {way}, {work}")
            if seconds > LONG:
                break
        return best

    def _fastest_read(self, rows: int) -> Peak:
        size = rows * FEATURES * self._setting.dtype.itemsize
        seconds, way = self._best(self._reads(rows))
        return Peak(size / seconds, f"measured: {way}, {size / 2**20:.0f} MiB")

    def _products(self, side: int) -> Ways:
        x, weight, out = (self._ones(side, side) for _ in range(3))
        return {"torch.mm": lambda: torch.mm(x, weight.t(), out=out), **self._projection(x, weight, out)}

    def _reads(self, rows: int) -> Ways:
        weight, x, out = self._ones(rows, FEATURES), self._ones(1, FEATURES), self._ones(1, rows)
        return {
            "sum": lambda: weight.view(torch.int32).sum(),
            "torch.mm of one token": lambda: torch.mm(x, weight.t(), out=out),
            **self._projection(x, weight, out),
        }

    def _projection(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> Ways:
        """Return the layer's fused projection, if it has one."""
        setting = self._setting
        spec = LinearSpec(weight.shape[1], weight.shape[0], 1, setting.dtype, setting.device)
        policy = "reference" if setting.ops == "reference" else "auto"
        choice = choose("linear", spec, setting.backend.ops(), policy)
        if choice.name == "reference":  # that is torch.mm
            return {}
        packed = choice.op.pack(weight)
        return {choice.name: lambda: choice.op(packed, x=x, bias=None, out=out)}

    def _ones(self, *shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=self._setting.dtype, device=self._setting.device)

    def _best(self, ways: Ways) -> tuple[float, str]:
        """Return the shortest time of any way in seconds, and which way it was."""
        return min((self._shortest(work), name) for name, work in ways.items())

    def _shortest(self, work: Callable[[], object]) -> float:
        synchronize = self._setting.backend.synchronize
        best, end, done = float("inf"), time.perf_counter() + SECONDS, 0
        while done < REPEATS or time.perf_counter() < end:
            synchronize()
            start = time.perf_counter()
            work()
            synchronize()
            best = min(best, time.perf_counter() - start)
            done += 1
        return best
