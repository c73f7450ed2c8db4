"""Print result files and comparisons of them. Needs neither torch nor a backend."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mla.bench import results
from mla.bench.results import ceilings_file, compare
from mla.bench.results.compare import Comparison
from mla.bench.results.schema import Run
from mla.bench.terminal import ceilings, run_table
from mla.bench.terminal.digits import number
from mla.command.exit_codes import Exit
from mla.command.table import aligned, markdown

_HEADER = ("scenario", "implementation", "base ms", "new ms", "time ratio", "90% CI", "verdict")


def show(path: Path, kind: str) -> str:
    """Return a stored run or a ceilings file as it was printed. Raises `ResultError`."""
    if ceilings_file.is_ceilings(path):
        return ceilings.render(ceilings_file.read(path), kind)
    return run_table.render(results.read(path), kind)


def compare_files(
    base: Path, others: Sequence[Path], noise: float, kind: str
) -> tuple[str, list[Comparison]]:
    """Return what to print about every file compared with the base, and all cases. Raises `ResultError`."""
    base_run = results.read(base)
    text, every = "", []
    for path in others:
        printed, cases = compare_runs(base_run, results.read(path), f"{path} against {base}", kind, noise)
        text += printed
        every += cases
    return text, every


def compare_runs(
    base: Run, run: Run, title: str, kind: str, noise: float = compare.NOISE
) -> tuple[str, list[Comparison]]:
    """Return what to print about a run compared with the base, and all its cases."""
    cases = compare.compare(base, run, noise)
    lines = [title, *(f"warning: {warning}" for warning in compare.warnings(base, run)), ""]
    rows = map(_row, cases)
    table = markdown(_HEADER, rows) if kind == "md" else aligned(_HEADER, rows, words=_HEADER)
    return "\n".join(lines) + "\n" + table + _reasons(cases), cases


def verdict(cases: Sequence[Comparison], limit: float | None) -> Exit:
    """Return the exit code, 1 if a case is certainly slower by more than `limit`; name those on stderr."""
    if all(case.verdict == compare.REFUSED for case in cases):
        sys.stderr.write("nothing could be compared\n")
        return Exit.NOTHING_RAN
    regressions = compare.slower(cases, limit) if limit is not None else []
    for case in regressions:
        sys.stderr.write(
            f"regression: {case.scenario}, {case.implementation} takes {case.ratio:.3f} times as long\n"
        )
    return Exit.REGRESSION if regressions else Exit.OK


def _row(case: Comparison) -> tuple[str, ...]:
    interval = f"{case.interval[0]:.3f} .. {case.interval[1]:.3f}" if case.interval else "-"
    ratio = "-" if case.ratio is None else f"{case.ratio:.3f}"
    times = (number(case.base_ms), number(case.new_ms))
    return (case.scenario, case.implementation, *times, ratio, interval, case.verdict)


def _reasons(cases: Sequence[Comparison]) -> str:
    lines = [f"{case.scenario}, {case.implementation}: {case.reason}\n" for case in cases if case.reason]
    return "\n" + "".join(lines) if lines else ""
