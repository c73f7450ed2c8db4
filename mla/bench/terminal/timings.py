"""A case's further timings (cold, graph, device clock) in words and as columns. Needs no torch."""

from __future__ import annotations

from mla.bench.results.schema import Case, Latency, Run, Timing
from mla.bench.terminal.digits import known, number

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


def timing_lines(run: Run) -> list[str]:
    """Return one line per case that was timed in more ways than the table's columns show."""
    return [line for line in map(_line, run.cases) if line]


def _line(case: Case) -> str:
    timings = {name: one for name, one in by_kind(case).items() if one.latency_ms}
    if set(timings) <= {"cold"} or case.latency_ms is None:
        return ""
    parts = [_part(case, case.latency_ms, name, one) for name, one in timings.items()]
    return f"{case.scenario}, {case.implementation}: {', '.join(parts)}{_launch(case)}"


def _part(case: Case, warm: Latency, name: str, timing: Timing) -> str:
    assert timing.latency_ms is not None
    latency = timing.latency_ms
    ratio = f" ({number(latency.median / warm.median)}x warm)" if name == "cold" else ""
    return f"{name.replace('_', ' ')} {known(latency.median, latency.ci95)} ms{ratio}"


def _launch(case: Case) -> str:
    return {True: "; launch bound", False: "; not launch bound", None: ""}[case.launch_bound]
