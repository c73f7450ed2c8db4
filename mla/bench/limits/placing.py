"""Where a latency lies under the device's limits, from ceilings that were measured: needs no device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from mla.bench.results.cases import device_cost
from mla.bench.results.schema import Case, Ceiling, Cost, Roofline
from mla.bench.terminal.digits import number

# Most bytes read: more than any cache holds, without allocating a long context's size a second time.
MOST_BYTES = 512 << 20
# Footprints are rounded to a multiple of this many bytes, larger ones to eighths of a power of two.
GRAIN = 1 << 18
# A number is withheld that is TWICE as fast as the limit and beyond SPREADS of the limit's own spread, and at
# the latest from MOST_TIMES on: a measurement under load may be lower by any factor, and the highest counts.
TWICE, SPREADS, MOST_TIMES = 2.0, 1.5, 4.0


def rounded(count: int) -> int:
    """Return the bytes that are read to measure `count`: cases of similar size share a measurement."""
    count = min(count, MOST_BYTES)
    grain = max(GRAIN, 1 << max(0, count.bit_length() - 4))
    return max(grain, count // grain * grain)


def merged(ceilings: Iterable[Ceiling]) -> list[Ceiling]:
    """Return one ceiling for each kind of work, dtype and footprint: the highest, and the lowest of all."""
    kinds: dict[tuple[str, str | None, int | None], Ceiling] = {}
    for one in ceilings:
        key = (one.work, one.dtype, one.footprint_bytes if one.work != "matmul" else None)
        kinds[key] = higher(kinds[key], one) if key in kinds else one
    return list(kinds.values())


def higher(first: Ceiling, second: Ceiling) -> Ceiling:
    """Return the higher of two measurements of the same thing, which keeps the lowest of both."""
    best = max(first, second, key=lambda one: one.value)
    known = [one.lowest for one in (first, second) if one.lowest is not None]
    return msgspec.structs.replace(best, lowest=min(known) if known else None)


def limits(ceilings: Sequence[Ceiling], dtype: str, footprint: int) -> tuple[Ceiling, Ceiling] | None:
    """Return the limits of reading and of products; None without both.

    What is reached on a larger footprint counts as well: a smaller one costs no more per byte but launches.
    """
    least = rounded(footprint)
    reads = [one for one in ceilings if one.work == "read" and (one.footprint_bytes or least) >= least]
    products = [one for one in ceilings if one.work == "matmul" and one.dtype == dtype]
    if not reads or not products:
        return None
    read, product = (max(ones, key=lambda one: one.value) for ones in (reads, products))
    return read, product


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
        if floor >= min(max(TWICE, SPREADS * spread), MOST_TIMES) * latency_ms:
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
    one = device_cost(case)  # of a layer
    if one is None or case.latency_ms is None:
        return
    whole = Cost(flops=case.layers * one.flops, bytes=case.layers * one.bytes)
    found = limits(ceilings, case.dtype, whole.bytes)
    if found is None:
        return
    case.roofline = place(one, case.latency_ms.median, *found)
    for stage in case.stages:
        if stage.cost is not None and stage.ms:
            stage.roofline = place(stage.cost, stage.ms, *found)
