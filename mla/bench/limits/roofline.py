"""The limits of a run's setting: measured before its cases and at least once more, the highest kept."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from time import perf_counter_ns as now_ns
from typing import Literal

import msgspec
import torch

from mla.bench.limits.microbench import Microbenchmark
from mla.bench.limits.placing import higher, implausible, place, rounded
from mla.bench.results.schema import Ceiling, Cost, Roofline
from mla.bench.subjects.setting import Setting
from mla.bench.terminal.ceilings import rate
from mla.text import dtype_name
from mla_backends.api import Peak

# Footprints whose reading is a limit of smaller ones too, which are hardly more than launches.
SMALL = (1 << 20, 1 << 22)
# How often a limit is measured while cases run, and at most: where a number lies above it.
TIMES, MOST_TIMES = 4, 16
# A declared and a measured limit that differ by so much are both named.
DIFFER = 1.5
# Measurements that differ by so much were disturbed.
UNSTEADY = 1.2

_Work = Literal["read", "matmul"]


@dataclass
class _Record:
    """A limit measured in this process: the highest of its measurements, which knows the lowest."""

    best: Ceiling
    benchmark: Microbenchmark
    measure: Callable[[], Ceiling]
    times: int = 1
    unsteady: bool = False  # two measurements differed: another load may have hidden the fastest way

    def again(self, anew: bool) -> None:
        """Measure once more, by the ways that were nearly the fastest, or `anew` by all of them."""
        self.times += 1
        self.benchmark.anew = anew or self.unsteady
        found, before = _repeatable(self.measure()), self.best.value
        self.unsteady |= not before / UNSTEADY <= found.value <= before * UNSTEADY
        self.best = higher(self.best, found)


# Everything measured in this process, keyed by all it depends on.
_MEASURED: dict[Hashable, _Record] = {}


class RooflineModel:
    """The limits of one setting. Each is the highest known: declared by the backend, or measured."""

    def __init__(self, setting: Setting) -> None:
        self._dtype, self._backend = dtype_name(setting.dtype), setting.backend
        self._info = setting.backend.device_info()
        self._benchmark = Microbenchmark(setting.backend, setting.device, setting.dtype, setting.ops)
        names = (setting.backend.name, setting.device, setting.dtype, setting.ops, torch.get_num_threads())
        self._key = (*names, tuple(setting.backend.ops()))
        self._footprints: list[int] = []  # that were asked for
        self._products = False

    def used(self) -> list[Ceiling]:
        """Return the limits asked for so far, in the order of first use, at their highest."""
        found = [self.bandwidth(footprint) for footprint in self._footprints]
        found += [self.flops()] * self._products
        return list({(one.work, one.footprint_bytes): one for one in found}.values())

    def known(self, footprint: int) -> tuple[Ceiling, Ceiling] | None:
        """Return the limits of reading so many bytes and of products, measured now if they are not yet.

        None for a device that can do neither and declares no peak.
        """
        try:
            found = self.bandwidth(footprint), self.flops()
        except Exception:  # noqa: BLE001  # a device that cannot run the microbenchmark keeps its numbers
            return None
        if rounded(footprint) not in self._footprints:
            self._footprints.append(rounded(footprint))
        self._products = True
        return found

    def roofline(self, cost: Cost, latency_ms: float, footprint: int | None = None) -> Roofline:
        """Return how near a latency is to the larger of both floors; an empty roofline if one is unknown.

        `footprint` is the number of bytes read in rotation with the work's own: for a part of a forward,
        those of the whole forward. Default: the work's own.
        """
        found = self.known(footprint or cost.bytes)
        return Roofline() if found is None else place(cost, latency_ms, *found)

    def implausible(self, cost: Cost, latency_ms: float) -> str:
        """Return why work cannot be done in this time on this device; "" if it can, or nothing is known."""
        found = self.known(cost.bytes)
        return "" if found is None else implausible(cost, latency_ms, *found)

    def again(self, seconds: float, times: int = TIMES, anew: bool = False) -> None:
        """Measure the limits used so far once more, the least measured first, for about so many seconds.

        None is measured more than `times` times in a process. One that was measured only once is measured
        again whatever the time: it has no spread yet. `anew` tries every way again.
        """
        end = now_ns() + 1e9 * seconds
        for record in sorted(self._records(), key=lambda record: record.times):
            if record.times >= times or (record.times > 1 and now_ns() >= end):
                break
            try:
                record.again(anew)
            except Exception:  # noqa: BLE001  # memory may be short by now: what was measured stands
                record.times = MOST_TIMES  # never again
        self._backend.empty_cache()

    def flops(self) -> Ceiling:
        """Return FLOP per second of dense products in the run's dtype."""
        return self._highest({"flops": self._benchmark.square}, self._info.flops.get(self._dtype), "matmul")

    def bandwidth(self, count: int) -> Ceiling:
        """Return bytes per second of reading about `count` bytes."""
        measures: dict[Hashable, Callable[[], Ceiling]] = {
            size: partial(self._benchmark.read, size) for size in _sizes(rounded(count))
        }
        return self._highest(measures, self._info.bandwidth, "read")

    def _highest(
        self, measures: Mapping[Hashable, Callable[[], Ceiling]], peak: Peak | None, work: _Work
    ) -> Ceiling:
        """Return the highest of what is measured and of what is declared. Raises if there is neither."""
        try:
            best = max((self._once(*one) for one in measures.items()), key=lambda one: one.value)
        except Exception:
            if peak is None:
                raise
            dtype = self._dtype if work == "matmul" else None
            return Ceiling(work=work, value=peak.value, source=peak.source, dtype=dtype)
        return best if peak is None else _with_declared(best, peak)

    def _once(self, what: Hashable, measure: Callable[[], Ceiling]) -> Ceiling:
        key = (*self._key, what)
        if key not in _MEASURED:
            found = measure()
            self._backend.empty_cache()
            _MEASURED[key] = _Record(_repeatable(found), self._benchmark, measure)
        return _MEASURED[key].best

    def _records(self) -> list[_Record]:
        """Return what is known of the limits used so far."""
        sizes = {size for footprint in self._footprints for size in _sizes(footprint)}
        keys = [(*self._key, what) for what in (*sizes, *["flops"] * self._products)]
        return [_MEASURED[key] for key in keys if key in _MEASURED]


def _sizes(footprint: int) -> list[int]:
    return [footprint, *(size for size in SMALL if size > footprint)]


def _repeatable(found: Ceiling) -> Ceiling:
    """Return a first measurement, which is the lowest so far."""
    return msgspec.structs.replace(found, lowest=found.value)


def _with_declared(measured: Ceiling, peak: Peak) -> Ceiling:
    """Return the higher of a measured and a declared limit; the source names both where they differ much."""
    declared = msgspec.structs.replace(
        measured, value=peak.value, source=peak.source, lowest=None, ours=False
    )
    high, low = (measured, declared) if measured.value >= peak.value else (declared, measured)
    if high.value < DIFFER * low.value:
        return high
    other = f"declared: {rate(low)}, {low.source}" if low is declared else f"{low.source}: {rate(low)}"
    return msgspec.structs.replace(high, source=f"{high.source}; {other}")
