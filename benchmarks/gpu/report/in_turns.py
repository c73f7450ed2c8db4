"""Kernels that ran in turns on the same shapes: rates, shares of the card's ceilings, and ratios."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mla.bench.results.schema import Case, Latency, Run

HEADER = (
    "shape", "kernel", "us", "timed", "GB/s", "TFLOP/s", "of copy bandwidth", "of 8192^3 product",
    "x best other", "x flashinfer", "check",
)  # fmt: skip
NOTE = """\
timed: how. Kernels are called one by one and in no graph, so below about 100 us a time may be that of the
host, which launches them. x: how many times as fast as the fastest other kernel, and as FlashInfer, on the
same shape and timed in the same way.
"""
FLASHINFER = "flashinfer"
# How a call was timed, the way that shows the kernel alone first: mode, and whether on the device's clock.
Way = tuple[str, bool]
WAYS: tuple[Way, ...] = (("graph", True), ("eager", True), ("graph", False), ("eager", False))

COPY, PRODUCT = "copy", "product of 8192"  # ceilings


def latencies(case: Case) -> dict[Way, Latency]:
    """Return the latencies of a case with warm caches, by way of timing."""
    by_way: dict[Way, Latency | None] = {("eager", False): case.latency_ms}
    for timing in case.timings:
        if timing.cache == "warm":
            by_way[timing.mode, timing.clock != "host"] = timing.latency_ms
    return {way: latency for way, latency in by_way.items() if latency is not None}


def best_way(case: Case) -> tuple[Way, float] | None:
    """Return how a case was best timed, and its median milliseconds; None if it has no time."""
    there = latencies(case)
    return next(((way, there[way].median) for way in WAYS if way in there), None)


def spoken(way: Way) -> str:
    """Return a way of timing as words."""
    mode, on_device = way
    return f"{mode}, {'device' if on_device else 'host'} clock"


def kernel(case: Case) -> str:
    """Return the op that ran."""
    return next(iter(case.ops.values()), "")


def ratio(case: Case, other: Case, ways: Sequence[Way] = WAYS, least_ms: float = 0.0) -> float | None:
    """Return how many times as fast as another a case is, both timed in the same way.

    None without such a time, or if one of the two is shorter than `least_ms`.
    """
    mine, theirs = latencies(case), latencies(other)
    for way in ways:
        if way in mine and way in theirs:
            times = mine[way].median, theirs[way].median
            return times[1] / times[0] if min(times) >= least_ms else None
    return None


def named(cases: Sequence[Case], name: str) -> list[Case]:
    """Return the cases that a kernel ran."""
    return [case for case in cases if kernel(case) == name]


def by_shape(runs: Mapping[str, Run]) -> Iterator[list[Case]]:
    """Yield the cases of every shape."""
    for run in runs.values():
        for name in dict.fromkeys(case.scenario for case in run.cases):
            yield [case for case in run.cases if case.scenario == name]


def rows(runs: Mapping[str, Run], ceilings: Mapping[str, float]) -> list[list[str]]:
    """Return a row per kernel and shape under `HEADER`."""
    return [_row(case, together, ceilings) for together in by_shape(runs) for case in together]


def _row(case: Case, together: Sequence[Case], ceilings: Mapping[str, float]) -> list[str]:
    check = f"{case.check.status} {case.check.reason}".strip()
    best = best_way(case)
    if best is None:
        return [case.scenario, kernel(case), *["-"] * 8, check]
    way, ms = best
    rates = case.cost.bytes / ms * 1e3, case.cost.flops / ms * 1e3
    rest = [each for each in together if each is not case]
    return [
        case.scenario, kernel(case), f"{1e3 * ms:.4g}", spoken(way),
        f"{rates[0] / 1e9:.4g}", f"{rates[1] / 1e12:.4g}",
        _share(rates[0], ceilings.get(COPY)), _share(rates[1], ceilings.get(PRODUCT)),
        _lowest(case, rest), _lowest(case, named(rest, FLASHINFER)), check,
    ]  # fmt: skip


def _share(rate: float, ceiling: float | None) -> str:
    return f"{100 * rate / ceiling:.0f} %" if ceiling else "-"


def _lowest(case: Case, rest: Sequence[Case]) -> str:
    """Return the ratio to the fastest of the rest."""
    ratios = [value for value in (ratio(case, other) for other in rest) if value is not None]
    return f"{min(ratios):.2f}x" if ratios else "-"
