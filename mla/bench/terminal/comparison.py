"""What `compare` prints. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

from mla.bench.results import compare
from mla.bench.results.compare import Comparison
from mla.bench.results.schema import Run
from mla.bench.terminal.digits import known
from mla.command.table import aligned, markdown
from mla_backends.outside import escaped

_HEADER = ("scenario", "implementation", "base median ms", "new median ms", "time ratio", "90% CI", "verdict")


def compare_runs(
    base: Run, run: Run, title: str, kind: str, noise: float = compare.NOISE
) -> tuple[str, list[Comparison]]:
    """Return what to print about a run compared with the base, and all its cases."""
    cases = compare.compare(base, run, noise)
    lines = [escaped(title), *(f"warning: {warning}" for warning in compare.warnings(base, run)), ""]
    rows = map(_row, cases)
    table = markdown(_HEADER, rows) if kind == "md" else aligned(_HEADER, rows, words=_HEADER)
    return "\n".join(lines) + "\n" + table + _reasons(cases), cases


def _row(case: Comparison) -> tuple[str, ...]:
    interval = f"{case.interval[0]:.3f} .. {case.interval[1]:.3f}" if case.interval else "-"
    about = "" if case.judged else "~"
    ratio = "-" if case.ratio is None else f"{about}{case.ratio:.3f}"
    times = (known(case.base_ms, case.base_ci), known(case.new_ms, case.new_ci))
    return (case.scenario, case.implementation, *times, ratio, interval, case.verdict)


def _reasons(cases: Sequence[Comparison]) -> str:
    lines = [f"{case.scenario}, {case.implementation}: {case.remarks}\n" for case in cases if case.remarks]
    return "\n" + "".join(lines) if lines else ""
