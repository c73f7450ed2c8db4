"""`new-backend`: write the project of a new backend."""

from __future__ import annotations

from pathlib import Path

import click

from mla.command.console import out
from mla.command.exit_codes import Exit
from mla.command.options import FILE, Word


@click.command("new-backend", short_help="Write the project of a new backend.")
@click.argument(
    "name", cls=Word, help="Name of the backend and of its torch device: lower-case, like 'acme'."
)
@click.argument(
    "folder", cls=Word, metavar="DIR", type=FILE, help="Where to write it: a new folder, or an empty one."
)
def new_backend(name: str, folder: Path) -> int:
    """Write a complete project for a backend: the package with one example op, its tests, and a README.

    It is for a device that torch knows as torch.NAME once its vendor's package is imported. The project is
    written whole or not at all; the next commands to run are printed.

    Exit code 0 if it was written; 2 if NAME is not a valid name or taken, or if DIR is not empty.
    """
    from mla.bench.scaffold.new_backend import create, next_commands

    create(name, folder)
    out(next_commands(name, folder))
    return Exit.OK
