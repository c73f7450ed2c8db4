"""The further ways of timing of a case, by kind."""

from __future__ import annotations

from mla.bench.results.schema import Case, Latency, Timing

#: Short name -> (graph replayed, cache cold, device clock), in the order they are named.
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
    """Return the latency with a swept cache, otherwise timed as the headline."""
    found = by_kind(case).get("cold")
    return found.latency_ms if found else None


def by_kind(case: Case) -> dict[str, Timing]:
    """Return short name -> timing, for those there are."""
    found = {(one.mode == "graph", one.cache == "cold", one.clock != case.clock): one for one in case.timings}
    return {name: found[kind] for name, kind in KINDS.items() if kind in found}


def flat_timings(case: Case) -> dict[str, float | None]:
    """Return column -> median, the same columns for every case."""
    timings = by_kind(case)
    medians = {name: one.latency_ms.median for name, one in timings.items() if one.latency_ms}
    return {f"{name}_ms": medians.get(name) for name in KINDS}
