"""Rooflines: how near a latency comes to the device's limits, declared by the backend or else measured."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

from mla.bench.limits.microbench import Microbenchmark
from mla.bench.results.schema import Ceiling, Cost, Roofline
from mla.bench.subjects.setting import Setting
from mla.text import dtype_name

# Most bytes read: more than any cache holds, without allocating a long context's size a second time.
MOST_BYTES = 512 << 20
# Footprints are rounded to a multiple of this many bytes, larger ones to eighths of a power of two.
GRAIN = 1 << 18

# Everything measured in this process, keyed by all it depends on.
_MEASURED: dict[Hashable, Ceiling] = {}


class RooflineModel:
    """The limits of one setting, each measured at most once per process."""

    def __init__(self, setting: Setting) -> None:
        self._dtype = dtype_name(setting.dtype)
        self._info = setting.backend.device_info()
        self._benchmark = Microbenchmark(setting.backend, setting.device, setting.dtype, setting.ops)
        names = (setting.backend.name, setting.device, setting.dtype, setting.ops, torch.get_num_threads())
        self._key = (*names, tuple(setting.backend.ops()))
        self._used: list[Ceiling] = []

    def used(self) -> list[Ceiling]:
        """Return the limits used by rooflines so far, in the order of first use."""
        return list(self._used)

    def roofline(self, cost: Cost, latency_ms: float, footprint: int | None = None) -> Roofline:
        """Return how near a latency is to the larger of both floors; an empty roofline if one is unknown.

        `footprint` is the number of bytes read in rotation with the work's own: for a part of a forward,
        those of the whole forward. Default: the work's own.
        """
        try:
            bandwidth, flops = self.bandwidth(footprint or cost.bytes), self.flops()
        except Exception:  # noqa: BLE001  # a device that cannot run the microbenchmark keeps its numbers
            return Roofline()
        self._used += [ceiling for ceiling in (bandwidth, flops) if ceiling not in self._used]
        memory, compute = 1e3 * cost.bytes / bandwidth.value, 1e3 * cost.flops / flops.value
        floor = max(memory, compute)
        return Roofline(
            floor_ms=floor,
            fraction=floor / latency_ms,
            bound="memory" if memory >= compute else "compute",
            peak_source=bandwidth.source if memory >= compute else flops.source,
        )

    def flops(self) -> Ceiling:
        """Return FLOP per second of dense products in the run's dtype: declared, else measured."""
        declared = self._info.flops.get(self._dtype)
        if declared:
            return Ceiling(work="matmul", value=declared.value, source=declared.source, dtype=self._dtype)
        return self._once("flops", lambda: max(self._benchmark.squares(), key=lambda ceiling: ceiling.value))

    def bandwidth(self, count: int) -> Ceiling:
        """Return bytes per second of reading about `count` bytes: declared, else measured."""
        declared = self._info.bandwidth
        if declared:
            return Ceiling(work="read", value=declared.value, source=declared.source)
        size = _rounded(min(count, MOST_BYTES))
        return self._once(size, lambda: self._benchmark.read(size))

    def _once(self, what: Hashable, measure: Callable[[], Ceiling]) -> Ceiling:
        key = (*self._key, what)
        if key not in _MEASURED:
            _MEASURED[key] = measure()
        return _MEASURED[key]


def _rounded(count: int) -> int:
    """Round bytes down so that cases of similar size share a measurement."""
    grain = max(GRAIN, 1 << max(0, count.bit_length() - 4))
    return max(grain, count // grain * grain)
