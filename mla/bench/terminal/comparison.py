"""What `compare` prints: a table of verdicts, and how scenarios scale over ranks. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

from mla.bench.results import compare
from mla.bench.results.compare import Comparison
from mla.bench.results.scaling import Scaled, Scaling
from mla.bench.results.schema import Interval, Latency, Run
from mla.bench.terminal.digits import known, number, percent
from mla.command.table import table
from mla_backends.outside import escaped

_HEADER = ("scenario", "implementation", "base median ms", "new median ms", "time ratio", "90% CI", "verdict")
SCALING_COLUMNS = ("latency ms", "speedup", "90% CI", "efficiency", "collectives ms", "repeated")

# Most cases that a remark about many names.
MOST_NAMED = 3


def compare_runs(
    base: Run, run: Run, title: str, kind: str, noise: float = compare.NOISE
) -> tuple[str, list[Comparison]]:
    """Return what to print about a run compared with the base, and all its cases."""
    cases = compare.compare(base, run, noise)
    lines = [escaped(title), *(f"warning: {warning}" for warning in compare.warnings(base, run)), ""]
    if len(cases) > 1 and all(case.verdict == compare.REFUSED for case in cases):
        reasons = "; ".join(f"{why} ({len(names)})" for why, names in _by_remark(cases).items())
        return "\n".join([*lines, f"none of {len(cases)} cases can be compared: {reasons}\n"]), cases
    return "\n".join(lines) + "\n" + table(kind, _HEADER, map(_row, cases), _HEADER) + _reasons(cases), cases


def bounds(interval: Interval | None, places: int = 3) -> str:
    """Return "low .. high" with as many decimal places; "-" for None."""
    return f"{interval[0]:.{places}f} .. {interval[1]:.{places}f}" if interval else "-"


def _row(case: Comparison) -> tuple[str, ...]:
    ratio = "-" if case.ratio is None else f"{'' if case.judged else '~'}{case.ratio:.3f}"
    times = map(_latency, case.times)
    return (case.scenario, case.implementation, *times, ratio, bounds(case.interval), case.verdict)


def _latency(latency: Latency | None) -> str:
    return known(latency.median, latency.ci95) if latency else "-"


def _reasons(cases: Sequence[Comparison]) -> str:
    """Return a line for every remark, which names the cases that it is about, or the first of many."""
    lines = []
    for why, names in _by_remark(cases).items():
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        lines.append(f"{'; '.join(names[:MOST_NAMED])}{more}: {why}\n")
    return "\n" + "".join(lines) if lines else ""


def _by_remark(cases: Sequence[Comparison]) -> dict[str, list[str]]:
    """Return remark -> the cases that have it."""
    found: dict[str, list[str]] = {}
    for case in cases:
        if case.remarks:
            found.setdefault(case.remarks, []).append(f"{case.scenario}, {case.implementation}")
    return found


def scaling_tables(found: Sequence[Scaling], kind: str) -> str:
    """Return a table for every scenario that is there on ranks and on one device; "" if none is."""
    if not found:
        return ""
    units = "cores" if all(scenario.base.threads is not None for scenario in found) else "devices"
    title = f"strong scaling: speedup over the base; efficiency = speedup / {units} used\n"
    return "\n".join([title, *(_scaling_table(scenario, kind) for scenario in found)])


def scaling_cells(row: Scaled) -> tuple[str, ...]:
    """Return what `SCALING_COLUMNS` say of a row."""
    return (
        _latency(row.case.latency_ms),
        f"{row.speedup:.2f}",
        bounds(row.interval, 2),
        percent(row.efficiency),
        number(row.collective_ms),
        percent(row.repeated),
    )


def _scaling_table(found: Scaling, kind: str) -> str:
    title = f"{found.scenario}, {found.implementation}"
    rows = [(row.layout, str(row.resources), *scaling_cells(row)) for row in found.rows]
    text, remark = table(kind, (title, "on", *SCALING_COLUMNS), rows, (title, "on")), found.remark()
    return f"{text}\n{remark}\n" if remark else text
