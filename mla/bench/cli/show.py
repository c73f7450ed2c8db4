"""`show`: print a stored result again."""

from __future__ import annotations

from pathlib import Path

import click

from mla.bench import results
from mla.bench.results import ceilings_file
from mla.bench.terminal import ceilings, run_table
from mla.command.console import out
from mla.command.exit_codes import Exit
from mla.command.options import FILE, Word


@click.command(short_help="Print a stored run again; torch is not needed.")
@click.argument("run", cls=Word, type=FILE, help="Result file (-o).")
@click.option(
    "--format",
    "kind",
    type=click.Choice(run_table.FORMATS),
    default="table",
    show_default=True,
    help="Format of what is printed.",
)
def show(run: Path, kind: str) -> int:
    """Print a run from its result file, in any format."""
    out(stored(run, kind))
    return Exit.OK


def stored(path: Path, kind: str) -> str:
    """Return a stored run, or what `ceilings` stored, as it was printed. Raises `ResultError`."""
    data = results.content(path)  # of a pipe there is only one reading
    if ceilings_file.is_ceilings(data):
        return ceilings.render(results.decoded(data, path, ceilings_file.decode), kind)
    return run_table.render(results.decoded(data, path, results.decode), kind)
