"""`show`: print a stored result again."""

from __future__ import annotations

from pathlib import Path

import click

from mla.bench import results
from mla.bench.results.file import decode_ceilings, is_ceilings
from mla.bench.terminal import ceilings, run_table
from mla.command.console import out
from mla.command.exit_codes import Exit
from mla.command.options import DETAIL, FILE, Word, add_options


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
@add_options(DETAIL)
def show(run: Path, kind: str, detail: run_table.Detail | None) -> int:
    """Print a run from its result file, in any format."""
    out(stored(run, kind, detail or "short"))
    return Exit.OK


def stored(path: Path, kind: str, detail: run_table.Detail = "short") -> str:
    """Return a stored run, or what `ceilings` stored, as it was printed. Raises `ResultError`."""
    data = results.content(path)  # of a pipe there is only one reading
    if is_ceilings(data):
        return ceilings.render(results.decoded(data, path, decode_ceilings), kind)
    return run_table.render(results.decoded(data, path, results.decode), kind, detail)
