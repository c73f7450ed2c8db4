"""Print a case's further timings (cold, graph, device clock). Needs no torch."""

from __future__ import annotations

from mla.bench.results.schema import Case, Latency, Run, Timing
from mla.bench.results.timings import by_kind
from mla.bench.terminal.digits import known, number


def timing_lines(run: Run) -> list[str]:
    """Return one line per case with more timings than the table's columns show."""
    return [line for line in map(_line, run.cases) if line]


def _line(case: Case) -> str:
    timings = {name: timing for name, timing in by_kind(case).items() if timing.latency_ms}
    if set(timings) <= {"cold"} or case.latency_ms is None:
        return ""
    parts = [_part(case.latency_ms, name, timing) for name, timing in timings.items()]
    return f"{case.scenario}, {case.implementation}: {', '.join(parts)}{_launch(case)}"


def _part(warm: Latency, name: str, timing: Timing) -> str:
    assert timing.latency_ms is not None
    latency = timing.latency_ms
    ratio = f" ({number(latency.median / warm.median)}x warm)" if name == "cold" else ""
    return f"{name.replace('_', ' ')} {known(latency.median, latency.ci95)} ms{ratio}"


def _launch(case: Case) -> str:
    return {True: "; launch bound", False: "; not launch bound", None: ""}[case.launch_bound]
