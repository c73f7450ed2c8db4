"""What `compare` prints. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

from mla.bench.results import compare
from mla.bench.results.compare import Comparison
from mla.bench.results.schema import Run
from mla.bench.terminal.digits import number
from mla.command.table import aligned, markdown

_HEADER = ("scenario", "implementation", "base ms", "new ms", "time ratio", "90% CI", "verdict")


def compare_runs(
    base: Run, run: Run, title: str, kind: str, noise: float = compare.NOISE
) -> tuple[str, list[Comparison]]:
    """Return what to print about a run against the base, and all its cases."""
    cases = compare.compare(base, run, noise)
    lines = [title, *(f"warning: {one}" for one in compare.warnings(base, run)), ""]
    rows = map(_row, cases)
    table = markdown(_HEADER, rows) if kind == "md" else aligned(_HEADER, rows, words=_HEADER)
    return "\n".join(lines) + "\n" + table + _reasons(cases), cases


def _row(one: Comparison) -> tuple[str, ...]:
    interval = f"{one.interval[0]:.3f} .. {one.interval[1]:.3f}" if one.interval else "-"
    ratio = "-" if one.ratio is None else f"{one.ratio:.3f}"
    times = (number(one.base_ms), number(one.new_ms))
    return (one.scenario, one.implementation, *times, ratio, interval, one.verdict)


def _reasons(cases: Sequence[Comparison]) -> str:
    lines = [f"{one.scenario}, {one.implementation}: {one.reason}\n" for one in cases if one.reason]
    return "\n" + "".join(lines) if lines else ""
