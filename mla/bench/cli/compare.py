"""The commands that read result files, and what commands with arguments share."""

from __future__ import annotations

from pathlib import Path

import click

from mla.bench.terminal import comparison
from mla.bench.terminal.run_table import FORMATS
from mla.command import console
from mla.command.options import FILE, Word, percent


@click.command(short_help="Compare result files; torch is not needed.")
@click.argument("base", cls=Word, type=FILE, help="Result file (-o) that the others are compared with.")
@click.argument("runs", cls=Word, type=FILE, nargs=-1, required=True, help="Result files to compare.")
@click.option("--noise", callback=percent, default="2%", show_default=True, help="What counts as the same.")
@click.option(
    "--fail-slower", callback=percent, metavar="PERCENT", help="Exit 1 if a case is surely slower by more."
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["table", "md"]),
    default="table",
    show_default=True,
    help="Of what is printed; md for a pull request.",
)
def compare(base: Path, runs: tuple[Path, ...], noise: float, fail_slower: float | None, kind: str) -> int:
    """Say of every case whether it is FASTER, SLOWER, the SAME or UNDECIDED against the base run.

    Verdicts come from the interval of the ratio of times, never from a single number. Cases whose workload,
    config, dtype or clock differ are REFUSED; other differences are named.

    Exit code 0; 1 with --fail-slower and a case that is slower beyond doubt; 2 for a file that is no
    result; 5 if nothing could be compared.
    """
    text, found = comparison.compare_files(base, runs, noise, kind)
    console.out(text)
    return comparison.verdict(found, fail_slower)


@click.command(short_help="Print a stored run again; torch is not needed.")
@click.argument("run", cls=Word, type=FILE, help="Result file (-o).")
@click.option(
    "--format",
    "kind",
    type=click.Choice(FORMATS),
    default="table",
    show_default=True,
    help="Of what is printed.",
)
def show(run: Path, kind: str) -> int:
    """Print a run from its result file, in any format."""
    console.out(comparison.show(run, kind))
    return 0
