"""How near a latency is to the device's limits: declared ones where the backend knows them, else measured."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

from mla.bench.limits.microbench import Yardstick
from mla.bench.results.schema import Ceiling, Cost, Roofline
from mla.bench.subjects.setting import Setting
from mla.text import dtype_name

#: Bytes read at most: more than any cache holds, and a long context must not ask for its size a second time.
MOST_BYTES = 512 << 20
#: Footprints are measured in whole numbers of this many bytes, larger ones in eighths of a power of two.
GRAIN = 1 << 18

#: What was measured in this process, by everything it depends on.
_MEASURED: dict[Hashable, Ceiling] = {}


class Ceilings:
    """Ceilings of one setting, each measured at most once in a process."""

    def __init__(self, setting: Setting) -> None:
        self._dtype = dtype_name(setting.dtype)
        self._info = setting.backend.device_info()
        self._yardstick = Yardstick(setting.backend, setting.device, setting.dtype, setting.ops)
        names = (setting.backend.name, setting.device, setting.dtype, setting.ops, torch.get_num_threads())
        self._key = (*names, tuple(setting.backend.ops()))
        self._used: list[Ceiling] = []

    def used(self) -> list[Ceiling]:
        """Return what the rooflines so far were held against, in the order of their first use."""
        return list(self._used)

    def roofline(self, cost: Cost, latency_ms: float, footprint: int | None = None) -> Roofline:
        """Return how near a latency is to the larger of both floors; nothing where one cannot be known.

        `footprint` is the bytes in turn with which the work's own are read: those of the whole forward for a
        part of one. Default: its own.
        """
        try:
            bandwidth, flops = self.bandwidth(footprint or cost.bytes), self.flops()
        except Exception:  # noqa: BLE001  # a device that cannot run the yardstick must not cost the numbers
            return Roofline()
        self._used += [one for one in (bandwidth, flops) if one not in self._used]
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
        return self._once("flops", lambda: max(self._yardstick.squares(), key=lambda found: found.value))

    def bandwidth(self, count: int) -> Ceiling:
        """Return bytes per second of reading about `count` bytes: declared, else measured."""
        declared = self._info.bandwidth
        if declared:
            return Ceiling(work="read", value=declared.value, source=declared.source)
        size = _rounded(min(count, MOST_BYTES))
        return self._once(size, lambda: self._yardstick.read(size))

    def _once(self, what: Hashable, measure: Callable[[], Ceiling]) -> Ceiling:
        key = (*self._key, what)
        if key not in _MEASURED:
            _MEASURED[key] = measure()
        return _MEASURED[key]


def _rounded(count: int) -> int:
    """Round bytes down, so that cases of nearly the same size share a measurement."""
    grain = max(GRAIN, 1 << max(0, count.bit_length() - 4))
    return max(grain, count // grain * grain)
