"""The further timings of a case, by kind."""

from __future__ import annotations

from mla.bench.results.schema import Case, Latency, Timing

# Short name -> (graph replayed, cache cold, device clock), in the order in which they are listed.
KINDS = {
    "cold": (False, True, False),
    "device": (False, False, True),
    "device_cold": (False, True, True),
    "graph": (True, False, False),
    "graph_cold": (True, True, False),
    "graph_device": (True, False, True),
    "graph_device_cold": (True, True, True),
}


def cold(case: Case) -> Latency | None:
    """Return the latency with a cold cache, otherwise timed like the headline."""
    timing = by_kind(case).get("cold")
    return timing.latency_ms if timing else None


def by_kind(case: Case) -> dict[str, Timing]:
    """Return short name -> timing, for the timings that the case has."""
    timings = {
        (timing.mode == "graph", timing.cache == "cold", timing.clock != case.clock): timing
        for timing in case.timings
    }
    return {name: timings[kind] for name, kind in KINDS.items() if kind in timings}


def flat_timings(case: Case) -> dict[str, float | None]:
    """Return column -> median, with the same columns for every case."""
    timings = by_kind(case)
    medians = {name: timing.latency_ms.median for name, timing in timings.items() if timing.latency_ms}
    return {f"{name}_ms": medians.get(name) for name in KINDS}
