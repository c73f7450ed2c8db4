"""What `compare` prints. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

from mla.bench.results import compare
from mla.bench.results.compare import Comparison
from mla.bench.results.schema import Run
from mla.bench.terminal import run_table

_HEADER = ("scenario", "implementation", "base ms", "new ms", "time ratio", "90% CI", "verdict")


def compare_runs(
    base: Run, run: Run, title: str, kind: str, noise: float = compare.NOISE
) -> tuple[str, list[Comparison]]:
    """Return what to print about a run against the base, and all its cases."""
    cases = compare.compare(base, run, noise)
    lines = [title, *(f"warning: {one}" for one in compare.warnings(base, run)), ""]
    table = _markdown(cases) if kind == "md" else _table(cases)
    return "\n".join(lines) + "\n" + table + _reasons(cases), cases


def _row(one: Comparison) -> tuple[str, ...]:
    interval = f"{one.interval[0]:.3f} .. {one.interval[1]:.3f}" if one.interval else "-"
    ratio = "-" if one.ratio is None else f"{one.ratio:.3f}"
    times = (run_table.number(one.base_ms), run_table.number(one.new_ms))
    return (one.scenario, one.implementation, *times, ratio, interval, one.verdict)


def _table(cases: Sequence[Comparison]) -> str:
    rows = [_HEADER, *map(_row, cases)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _markdown(cases: Sequence[Comparison]) -> str:
    rows = [_HEADER, ("---",) * len(_HEADER), *map(_row, cases)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _reasons(cases: Sequence[Comparison]) -> str:
    lines = [f"{one.scenario}, {one.implementation}: {one.reason}\n" for one in cases if one.reason]
    return "\n" + "".join(lines) if lines else ""
