"""`report`: result files as one HTML page. Needs neither torch nor a backend, but the extra `report`."""

from __future__ import annotations

from pathlib import Path

import click

from mla.bench import results
from mla.bench.report import page
from mla.command import console
from mla.command.exit_codes import Exit
from mla.command.options import FILE, Word
from mla.text import size


@click.command(short_help="Make an HTML page of result files; torch is not needed.")
@click.argument(
    "runs",
    cls=Word,
    type=FILE,
    nargs=-1,
    required=True,
    help="Result files (-o); the others are compared with the first.",
)
@click.option("--html", "target", metavar="FILE", type=FILE, required=True, help="The page to write.")
def report(runs: tuple[Path, ...], target: Path) -> int:
    """Write tables, plots, environment and method of result files into one page that opens offline.

    The page has no script and loads nothing. An earlier page is overwritten, any other file is not.
    Needs matplotlib and jinja2: pip install 'mla[report]'.

    Exit code 0; 2 for a file that is not a result, a page that cannot be written, or missing libraries.
    """
    page.check_target(target, runs)
    page.require()
    read = [results.read(path) for path in runs]
    text = page.render([str(path) for path in runs], read)
    page.write(text, target)
    count = sum(len(run.cases) for run in read)
    files = f"{len(read)} file{'s' * (len(read) > 1)}"
    console.note(f"wrote {target}: {count} cases of {files}, {size(len(text.encode()), KiB='.0f')}")
    return Exit.OK
