"""How near a latency comes to the device's limits, and the limits of a run's setting.

They are measured before its cases and at least once more; the highest is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter_ns as now_ns
from typing import Literal

import msgspec
import torch

from mla.bench.limits.microbench import Microbenchmark
from mla.bench.results.cases import device_cost
from mla.bench.results.schema import Case, Ceiling, Cost, Roofline
from mla.bench.subjects.setting import Setting
from mla.bench.terminal.ceilings import rate
from mla.bench.terminal.digits import number
from mla.text import dtype_name
from mla_backends.api import Peak

# Most bytes read: more than any cache holds, without allocating a long context's size a second time.
MAX_READ_BYTES = 512 << 20
# Footprints are rounded to a multiple of this many bytes, larger ones to eighths of a power of two.
GRAIN = 1 << 18
# A number is withheld that is TWICE as fast as the limit and beyond SPREADS of the limit's own spread, and at
# the latest from MAX_EXCESS on: a measurement under load may be lower by any factor, and the highest counts.
TWICE, SPREADS, MAX_EXCESS = 2.0, 1.5, 4.0


def rounded(count: int) -> int:
    """Return the bytes that are read to measure `count`: cases of similar size share a measurement."""
    count = min(count, MAX_READ_BYTES)
    grain = max(GRAIN, 1 << max(0, count.bit_length() - 4))
    return max(grain, count // grain * grain)


def merged(ceilings: Iterable[Ceiling]) -> list[Ceiling]:
    """Return one ceiling for each kind of work, dtype and footprint: the highest, and the lowest of all."""
    kinds: dict[tuple[str, str | None, int | None], Ceiling] = {}
    for ceiling in ceilings:
        key = (ceiling.work, ceiling.dtype, ceiling.footprint_bytes if ceiling.work != "matmul" else None)
        kinds[key] = higher(kinds[key], ceiling) if key in kinds else ceiling
    return list(kinds.values())


def higher(first: Ceiling, second: Ceiling) -> Ceiling:
    """Return the higher of two measurements of the same thing, which keeps the lowest of both."""
    best = max(first, second, key=_value)
    known = [ceiling.lowest for ceiling in (first, second) if ceiling.lowest is not None]
    return msgspec.structs.replace(best, lowest=min(known) if known else None)


def limits(ceilings: Sequence[Ceiling], dtype: str, footprint: int) -> tuple[Ceiling, Ceiling] | None:
    """Return the limits of reading and of products; None without both.

    What is reached on a larger footprint counts as well: a smaller one costs no more per byte but launches.
    """
    least = rounded(footprint)
    reads = [c for c in ceilings if c.work == "read" and (c.footprint_bytes or least) >= least]
    products = [c for c in ceilings if c.work == "matmul" and c.dtype == dtype]
    return (max(reads, key=_value), max(products, key=_value)) if reads and products else None


def _value(ceiling: Ceiling) -> float:
    return ceiling.value


def place(cost: Cost, latency_ms: float, read: Ceiling, product: Ceiling) -> Roofline:
    """Return how near a latency is to the larger of both floors; above 100 % only that it cannot be."""
    floor, bound, limit = _floor(cost, read, product)
    fraction: float | None = floor / latency_ms
    doubt = ""
    if floor > latency_ms:
        fraction, doubt = None, f"the limit or the time is suspect: {_excess(floor, latency_ms, limit)}"
    return Roofline(
        floor_ms=floor,
        fraction=fraction,
        bound="memory" if bound else "compute",
        peak_source=limit.source,
        doubt=doubt,
    )


def implausible(cost: Cost, latency_ms: float, read: Ceiling, product: Ceiling) -> str:
    """Return why a latency cannot be: far below its floor, beyond the spread of the limit; "" if it can."""
    for work, limit in ((cost.bytes, read), (cost.flops, product)):
        floor, spread = 1e3 * work / limit.value, limit.value / (limit.lowest or limit.value)
        if floor >= min(max(TWICE, SPREADS * spread), MAX_EXCESS) * latency_ms:
            return f"no device is this much faster than its limit: {_excess(floor, latency_ms, limit)}"
    return ""


def _floor(cost: Cost, read: Ceiling, product: Ceiling) -> tuple[float, bool, Ceiling]:
    """Return the milliseconds of the larger floor, whether it is that of memory, and its limit."""
    memory, compute = 1e3 * cost.bytes / read.value, 1e3 * cost.flops / product.value
    return (memory, True, read) if memory >= compute else (compute, False, product)


def _excess(floor: float, latency_ms: float, limit: Ceiling) -> str:
    spread = limit.value / limit.lowest - 1 if limit.lowest else 0.0
    varied = f", which varied by {100 * spread:.0f} %" if spread >= 0.005 else ""
    return (
        f"{number(latency_ms)} ms is {number(floor / latency_ms)} times as fast as the {number(floor)} ms "
        f"that the limit allows ({limit.source}{varied})"
    )


def place_case(case: Case, ceilings: Sequence[Ceiling]) -> None:
    """Put a case that has a number, and its stages, under these ceilings; it keeps its place without any."""
    cost = device_cost(case)  # of a layer
    known = limits(ceilings, case.dtype, case.layers * cost.bytes) if cost else None
    if cost is None or known is None or case.latency_ms is None:
        return
    case.roofline = place(cost, case.latency_ms.median, *known)
    for stage in case.stages:
        if stage.cost is not None and stage.ms:
            stage.roofline = place(stage.cost, stage.ms, *known)


# --------------------------------------------------------------------------------- the limits of a setting

# Footprints whose reading is a limit of smaller ones too, which are hardly more than launches.
SMALL_FOOTPRINTS = (1 << 20, 1 << 22)
# How often a limit is measured while cases run, and at most: where a number lies above it.
TIMES, MAX_TIMES = 4, 16
# A declared and a measured limit that differ by so much are both named.
DIFFER = 1.5

_Work = Literal["read", "matmul"]


@dataclass
class _Record:
    """A limit measured in this process: the highest of its measurements, which knows the lowest."""

    best: Ceiling
    measure: Callable[[], Ceiling]
    times: int = 1

    def again(self) -> None:
        """Measure once more."""
        self.times += 1
        self.best = higher(self.best, _lowest_so_far(self.measure()))


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
        ceilings = [self.bandwidth(footprint) for footprint in self._footprints]
        ceilings += [self.flops()] * self._products
        return list({(ceiling.work, ceiling.footprint_bytes): ceiling for ceiling in ceilings}.values())

    def known(self, footprint: int) -> tuple[Ceiling, Ceiling] | None:
        """Return the limits of reading so many bytes and of products, measured now if they are not yet.

        None for a device that can do neither and declares no peak.
        """
        try:
            known = self.bandwidth(footprint), self.flops()
        except Exception:  # noqa: BLE001  # a device that cannot run the microbenchmark keeps its numbers
            return None
        if rounded(footprint) not in self._footprints:
            self._footprints.append(rounded(footprint))
        self._products = True
        return known

    def roofline(self, cost: Cost, latency_ms: float, footprint: int | None = None) -> Roofline:
        """Return how near a latency is to the larger of both floors; an empty roofline if one is unknown.

        `footprint` is the number of bytes read in rotation with the work's own: for a part of a forward,
        those of the whole forward. Default: the work's own.
        """
        known = self.known(footprint or cost.bytes)
        return Roofline() if known is None else place(cost, latency_ms, *known)

    def implausible(self, cost: Cost, latency_ms: float) -> str:
        """Return why work cannot be done in this time on this device; "" if it can, or nothing is known."""
        known = self.known(cost.bytes)
        return "" if known is None else implausible(cost, latency_ms, *known)

    def again(self, seconds: float, times: int = TIMES) -> None:
        """Measure the limits used so far once more, the least measured first, for about so many seconds.

        None is measured more than `times` times in a process. One that was measured only once is measured
        again whatever the time: it has no spread yet.
        """
        end = now_ns() + 1e9 * seconds
        for record in sorted(self._records(), key=lambda record: record.times):
            if record.times >= times or (record.times > 1 and now_ns() >= end):
                break
            try:
                record.again()
            except Exception:  # noqa: BLE001  # memory may be short by now: what was measured stands
                record.times = MAX_TIMES  # never again
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
            best = max((self._once(*item) for item in measures.items()), key=_value)
        except Exception:
            if peak is None:
                raise
            dtype = self._dtype if work == "matmul" else None
            return Ceiling(work=work, value=peak.value, source=peak.source, dtype=dtype)
        return best if peak is None else _with_declared(best, peak)

    def _once(self, what: Hashable, measure: Callable[[], Ceiling]) -> Ceiling:
        key = (*self._key, what)
        if key not in _MEASURED:
            ceiling = measure()
            self._backend.empty_cache()
            _MEASURED[key] = _Record(_lowest_so_far(ceiling), measure)
        return _MEASURED[key].best

    def _records(self) -> list[_Record]:
        """Return what is known of the limits used so far."""
        sizes = {size for footprint in self._footprints for size in _sizes(footprint)}
        keys = [(*self._key, what) for what in (*sizes, *["flops"] * self._products)]
        return [_MEASURED[key] for key in keys if key in _MEASURED]


def _sizes(footprint: int) -> list[int]:
    return [footprint, *(size for size in SMALL_FOOTPRINTS if size > footprint)]


def _lowest_so_far(ceiling: Ceiling) -> Ceiling:
    """Return a first measurement, which is the lowest so far."""
    return msgspec.structs.replace(ceiling, lowest=ceiling.value)


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
