"""`compare`: a verdict for every case of result files against a base run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from mla.bench import results
from mla.bench.results.compare import REFUSED, Comparison, slower
from mla.bench.terminal.comparison import compare_runs
from mla.command.console import note, out
from mla.command.exit_codes import Exit
from mla.command.options import FILE, Word, parsed_by, percent


@click.command(short_help="Compare result files; torch is not needed.")
@click.argument("base", cls=Word, type=FILE, help="Result file (-o) that the others are compared with.")
@click.argument("runs", cls=Word, type=FILE, nargs=-1, required=True, help="Result files to compare.")
@click.option(
    "--noise", callback=parsed_by(percent), default="2%", show_default=True, help="What counts as the same."
)
@click.option(
    "--fail-slower",
    callback=parsed_by(percent),
    metavar="PERCENT",
    help="Exit 1 if the whole interval of a case's time ratio lies above this.",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["table", "md"]),
    default="table",
    show_default=True,
    help="Format of what is printed; md for a pull request.",
)
def compare(base: Path, runs: tuple[Path, ...], noise: float, fail_slower: float | None, kind: str) -> int:
    """Say for every case whether it is FASTER, SLOWER, the SAME or UNDECIDED against the base run.

    Verdicts come from the interval of the ratio of times, never from a single number. Cases whose workload,
    config, dtype or clock differ are REFUSED; other differences are named.

    Exit code 0; 1 with --fail-slower and a case that is slower beyond doubt; 2 for a file that is not a
    result; 5 if nothing could be compared.
    """
    first = results.read(base)
    cases: list[Comparison] = []
    text = ""
    for path in runs:
        printed, compared = compare_runs(first, results.read(path), f"{path} against {base}", kind, noise)
        text += printed
        cases += compared
    out(text)
    return verdict(cases, fail_slower)


def verdict(cases: Sequence[Comparison], limit: float | None) -> Exit:
    """Return the exit code: 1 if a case is slower by more than `limit` beyond doubt; stderr says which."""
    if all(case.verdict == REFUSED for case in cases):
        note("nothing could be compared")
        return Exit.NOTHING_RAN
    regressions = slower(cases, limit) if limit is not None else []
    for case in regressions:
        note(f"regression: {case.scenario}, {case.implementation} takes {case.ratio:.3f} times as long")
    return Exit.REGRESSION if regressions else Exit.OK
