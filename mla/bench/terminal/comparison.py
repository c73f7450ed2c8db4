"""`compare` and `show`: commands that read result files and need neither torch nor a backend."""

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
    """Return a stored run, or what `ceilings` stored, as it was printed. Raises `ResultError`."""
    if ceilings_file.is_ceilings(path):
        return ceilings.render(ceilings_file.read(path), kind)
    return run_table.render(results.read(path), kind)


def compare_files(
    base: Path, others: Sequence[Path], noise: float, kind: str
) -> tuple[str, list[Comparison]]:
    """Return what to print about every file against the base, and all cases. Raises `ResultError`."""
    first = results.read(base)
    text, found = "", []
    for path in others:
        printed, cases = compare_runs(first, results.read(path), f"{path} against {base}", kind, noise)
        text += printed
        found += cases
    return text, found


def compare_runs(
    base: Run, run: Run, title: str, kind: str, noise: float = compare.NOISE
) -> tuple[str, list[Comparison]]:
    """Return what to print about a run against the base, and all its cases."""
    cases = compare.compare(base, run, noise)
    lines = [title, *(f"warning: {one}" for one in compare.warnings(base, run)), ""]
    rows = map(_row, cases)
    table = markdown(_HEADER, rows) if kind == "md" else aligned(_HEADER, rows, words=_HEADER)
    return "\n".join(lines) + "\n" + table + _reasons(cases), cases


def verdict(found: Sequence[Comparison], limit: float | None) -> Exit:
    """Return the exit code: 1 when a case is surely slower by more than `limit`; says on stderr which."""
    if all(one.verdict == compare.REFUSED for one in found):
        sys.stderr.write("nothing could be compared\n")
        return Exit.NOTHING_RAN
    late = compare.slower(found, limit) if limit is not None else []
    for one in late:
        sys.stderr.write(
            f"regression: {one.scenario}, {one.implementation} takes {one.ratio:.3f} times as long\n"
        )
    return Exit.REGRESSION if late else Exit.OK


def _row(one: Comparison) -> tuple[str, ...]:
    interval = f"{one.interval[0]:.3f} .. {one.interval[1]:.3f}" if one.interval else "-"
    ratio = "-" if one.ratio is None else f"{one.ratio:.3f}"
    times = (number(one.base_ms), number(one.new_ms))
    return (one.scenario, one.implementation, *times, ratio, interval, one.verdict)


def _reasons(cases: Sequence[Comparison]) -> str:
    lines = [f"{one.scenario}, {one.implementation}: {one.reason}\n" for one in cases if one.reason]
    return "\n" + "".join(lines) if lines else ""
