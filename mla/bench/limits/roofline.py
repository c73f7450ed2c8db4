"""How near a latency comes to the device's limits, and the limits of a run's setting.

They are measured before the first case that needs them and once more after it; the highest is kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import chain
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
        same = (kinds.get(key, ceiling), ceiling)
        known = [each.lowest for each in same if each.lowest is not None]
        kinds[key] = msgspec.structs.replace(max(same, key=_value), lowest=min(known) if known else None)
    return list(kinds.values())


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
    memory, compute = 1e3 * cost.bytes / read.value, 1e3 * cost.flops / product.value
    floor, limit = max(memory, compute), read if memory >= compute else product
    above = floor > latency_ms
    doubt = f"the limit or the time is suspect: {_excess(floor, latency_ms, limit)}" if above else ""
    return Roofline(
        floor_ms=floor,
        fraction=None if above else floor / latency_ms,
        bound="memory" if limit is read else "compute",
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
# How often a limit is measured, and at most: where a number lies above it.
TIMES, MAX_TIMES = 2, 16
# A declared and a measured limit that differ by so much are both named.
DIFFER = 1.5

FLOPS = "flops"  # what is measured beside footprints
# All measurements of this process, by what they depend on, and by footprint or `FLOPS`; None: it failed.
_MEASURED: dict[Hashable, defaultdict[int | str, list[Ceiling | None]]] = {}


class RooflineModel:
    """The limits of one setting. Each is the highest known: declared by the backend, or measured."""

    def __init__(self, setting: Setting) -> None:
        self._dtype, self._backend = dtype_name(setting.dtype), setting.backend
        self._benchmark = Microbenchmark(setting.backend, setting.device, setting.dtype, setting.ops)
        names = (setting.backend.name, setting.device, setting.dtype, setting.ops, torch.get_num_threads())
        self._measured = _MEASURED.setdefault((*names, tuple(setting.backend.ops())), defaultdict(list))
        self._footprints: dict[int, None] = {}  # that were asked for, in order

    @property
    def _asked(self) -> list[int | str]:
        """What is measured for the footprints so far."""
        small = (size for size in SMALL_FOOTPRINTS if size > min(self._footprints, default=size))
        return [*dict.fromkeys((*self._footprints, *small)), *[FLOPS] * bool(self._footprints)]

    def used(self) -> list[Ceiling]:
        """Return the limits asked for so far, in the order of first use, at their highest."""
        known = [*self._highest("read"), *self._highest("matmul")]
        pairs = (limits(known, self._dtype, footprint) for footprint in self._footprints)
        return merged(chain.from_iterable(zip(*filter(None, pairs), strict=True)))

    def _highest(self, work: Literal["read", "matmul"]) -> Iterator[Ceiling]:
        """Yield what is known of one kind of work: measured, and then declared, for what was not."""
        info, dtype = self._backend.device_info(), self._dtype if work == "matmul" else None
        peak = info.flops.get(self._dtype) if dtype else info.bandwidth
        every = (ceiling for what in self._asked for ceiling in self._measured[what])
        measured = merged(ceiling for ceiling in every if ceiling is not None and ceiling.work == work)
        yield from measured if peak is None else (_with_declared(ceiling, peak) for ceiling in measured)
        if peak is not None:
            yield Ceiling(work=work, value=peak.value, source=peak.source, dtype=dtype)

    def known(self, footprint: int) -> tuple[Ceiling, Ceiling] | None:
        """Return the limits of reading so many bytes and of products, measured now if they are not yet.

        None for a device that can do neither and declares no peak.
        """
        self._footprints[rounded(footprint)] = None
        self.again(1)
        return limits([*self._highest("read"), *self._highest("matmul")], self._dtype, footprint)

    def implausible(self, cost: Cost, latency_ms: float) -> str:
        """Return why work cannot be done in this time on this device; "" if it can, or nothing is known."""
        known = self.known(cost.bytes)
        return "" if known is None else implausible(cost, latency_ms, *known)

    def above(self, cost: Cost, latency_ms: float) -> bool:
        """Return whether work takes less time than its limit allows."""
        known = self.known(cost.bytes)
        return known is not None and bool(place(cost, latency_ms, *known).doubt)

    def again(self, times: int = TIMES) -> None:
        """Measure the limits used so far once more, but for those measured so many times in this process."""
        for what in self._asked:
            if len(self._measured[what]) < times:
                self._measured[what].append(self._measure(what))
                self._backend.empty_cache()

    def _measure(self, what: int | str) -> Ceiling | None:
        """Return one more measurement; None where a device fails: it keeps what it has."""
        try:
            ceiling = self._benchmark.read(what) if isinstance(what, int) else self._benchmark.square()
        except Exception:  # noqa: BLE001  # it may lack an operation, or memory by now
            return None
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
