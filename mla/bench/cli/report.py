"""`report`: result files as one HTML page or as pictures. Needs the extra `report`, but no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from mla.bench import results
from mla.bench.report import require
from mla.bench.results.schema import Run
from mla.command import console, files
from mla.command.exit_codes import Exit
from mla.command.options import FILE, Word
from mla.text import size


@click.command(short_help="An HTML page, or pictures, of result files.")
@click.argument(
    "runs",
    cls=Word,
    type=FILE,
    nargs=-1,
    required=True,
    help="Result files (-o); the others are compared with the first.",
)
@click.option("--html", "target", metavar="FILE", type=FILE, help="The page to write.")
@click.option(
    "--pictures",
    "folder",
    metavar="FOLDER",
    type=FILE,
    help="Write every chart as an SVG file of its own, for light and for dark surroundings.",
)
def report(runs: tuple[Path, ...], target: Path | None, folder: Path | None) -> int:
    """Write tables, plots, environment and method of result files into one page that opens offline.

    The page has no script and loads nothing. An earlier page is overwritten, any other file is not; the same
    holds for pictures, which are for slides and documents.
    Needs matplotlib and jinja2: in a checkout, pip install '.[report]' ./backends (once released,
    pip install 'mla-bench[report]').

    \b
      python -m mla.bench report run.json --html report.html
      python -m mla.bench report before.json after.json --pictures pictures

    Exit code 0; 2 for a file that is not a result, a page that cannot be written, or missing libraries.
    """
    if target is None and folder is None:
        raise click.UsageError("Missing option '--html' (a page) or '--pictures' (a folder of charts).")
    require()
    from mla.bench.report import page  # for which no other command is to wait

    if target is not None:
        page.check_target(target, runs)
    read = [results.read(path) for path in runs]
    names = [str(path) for path in runs]
    if folder is not None:
        _pictures(names, read, folder)
    if target is not None:
        text = page.render(names, read)
        files.write_bytes(text.encode("utf-8", "replace"), target)
        console.note(f"wrote {target}: {_cases(read)}, {size(len(text.encode()), KiB='.0f')}")
    return Exit.OK


def _cases(runs: Sequence[Run]) -> str:
    count = sum(len(run.cases) for run in runs)
    return f"{count} cases of {len(runs)} file{'s' * (len(runs) > 1)}"


def _pictures(names: Sequence[str], runs: Sequence[Run], folder: Path) -> None:
    from mla.bench.report import page

    page.check_folder(folder)
    made = page.pictures(names, runs)
    page.write_pictures(made, folder)
    console.note(f"wrote {len(made)} pictures into {folder}: {_cases(runs)}")
