"""`doctor`: why a backend is or is not usable."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from mla.command import environment
from mla.command.backend import key_values
from mla.command.console import note, out
from mla.command.exit_codes import Exit
from mla.command.options import Word
from mla.errors import UsageError
from mla_backends import BackendOptionError


@click.command(short_help="Say why a backend is or is not usable.")
@click.argument("name", cls=Word, required=False, help="Backend, or package.module:attribute. Default: all.")
@click.option("-O", "backend_options", metavar="KEY=VALUE", multiple=True, help="Option of the backend NAME.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def doctor(name: str | None, backend_options: tuple[str, ...], as_json: bool) -> int:
    """Say why a backend is or is not usable, one fix per line.

    Imports torch, probes the backend, sets up its device and lists its ops for the default config, each in a
    process of its own, so that a library that aborts or hangs becomes a line of the report. If torch itself
    does not import, the faulty extension is named.

    `doctor torch -O device=NAME` does so for a device without a plugin.

    Exit code 0 if the backend, or without NAME any backend, is usable; 2 for an option that it does not
    take; 3 if it is not usable, or if there is no such backend.
    """
    from mla.bench.doctor import diagnosis

    if mixed := environment.mixed_installation():
        note(mixed)
    if backend_options and name is None:
        raise UsageError("-O is an option of one backend: name it, as in `doctor torch -O device=cpu`.")
    report = diagnosis.diagnose(name, key_values(backend_options))
    facts = {**asdict(report), "usable": report.usable}
    out(json.dumps(facts, indent=1) + "\n" if as_json else diagnosis.as_text(report))
    if any(one.state == BackendOptionError.state for one in report.backends):
        return Exit.USAGE
    return Exit.OK if report.usable else Exit.BACKEND
