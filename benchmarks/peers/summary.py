"""Compare ours with each peer and with the machine's limits, from the cases of one scenario."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mla.bench.results.cases import same_steps
from mla.bench.results.schema import Case, Ceiling
from mla.bench.terminal.digits import number

# Peers that ours is compared with by name, as well as with the best of all.
NAMED = ("transformers", "transformers-eager")


@dataclass(frozen=True)
class Limits:
    """Measured peaks: bytes per second at a case's footprint, and FLOP per second."""

    bandwidth: Callable[[int], Ceiling]
    flops: Callable[[], Ceiling]


def summary(cases: Sequence[Case], limits: Limits) -> str:
    """Return a table over the cases of one scenario, ours first, and a line comparing ours with the rest."""
    read = next((case for case in cases if case.implementation == "read"), None)
    rows = [
        ["implementation", "ms", "ours is", "% of read", "% of bandwidth", "% of compute", "faults", "check"]
    ]
    rows += [_row(case, cases[0], read, limits) for case in cases]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    table = "\n".join(line.rstrip() for line in [f"{cases[0].scenario}:", *lines])
    return f"{table}\n{_headline(cases)}\n"


def _row(case: Case, ours: Case, read: Case | None, limits: Limits) -> list[str]:
    ratio = speed_ratio(ours, case)
    return [
        case.implementation,
        number(case.latency_ms.median if case.latency_ms else None),
        f"{number(ratio)}x" if ratio and case not in (ours, read) else "-",
        _share(read.latency_ms.median if read and read.latency_ms else None, case),
        _share(1e3 * case.cost.bytes / limits.bandwidth(case.cost.bytes).value, case),
        "-" if case is read else _share(1e3 * case.cost.flops / limits.flops().value, case),
        number(case.memory.page_faults),
        "baseline" if case is read else case.check.status,
    ]


def _share(floor_ms: float | None, case: Case) -> str:
    return (
        "-"
        if floor_ms is None or case.latency_ms is None
        else f"{100 * floor_ms / case.latency_ms.median:.0f}"
    )


def speed_ratio(case: Case, other: Case) -> float | None:
    """Return how many times as fast a case is as another, by throughput in decode, by latency in prefill.

    Of decode passes, the steps count that both ran: a slow peer runs fewer.
    """
    case, other = same_steps(case, other)
    if case.latency_ms is None or other.latency_ms is None:
        return None
    if case.mode == "decode" and case.tokens_per_s and other.tokens_per_s:
        return case.tokens_per_s.median / other.tokens_per_s.median
    return other.latency_ms.median / case.latency_ms.median


def _headline(cases: Sequence[Case]) -> str:
    """Return the line of speed ratios and the fraction of the roofline."""
    ours = cases[0]
    ratios = {
        case.implementation: speed_ratio(ours, case) for case in cases[1:] if case.implementation != "read"
    }
    known = {name: ratio for name, ratio in ratios.items() if ratio is not None and name != "mla-reference"}
    if not known:
        return f"{ours.scenario}: nothing to compare ours with"
    best = min(known, key=known.__getitem__)
    parts = [f"{number(known[best])}x as fast as the best peer ({best})"]
    parts += [f"{number(known[name])}x as fast as {name}" for name in NAMED if name in known]
    limit = ours.roofline
    at = f"; {100 * limit.fraction:.0f} % of the {limit.bound} roofline" if limit.fraction is not None else ""
    return f"{ours.scenario}: ours is {', '.join(parts)}{at}"
