"""`replay`: make the call again that `--dump-failure` kept."""

from __future__ import annotations

from pathlib import Path

import click

from mla.command.backend import BackendOptions, backend_options, open_backend
from mla.command.console import note, out
from mla.command.exit_codes import Exit
from mla.command.options import FILE, Word

EPILOG = """\b
Examples:
  python -m mla.bench replay failed
  python -m mla.bench replay failed --runs 100
  python -m mla.bench replay failed --op reference

\b
Exit codes: 0 every call was right, 2 usage, 3 backend missing or unusable, 4 a call was wrong.
"""


@click.command(epilog=EPILOG, short_help="Make the call again that --dump-failure kept.")
@click.argument("folder", type=FILE, cls=Word, help="The folder that --dump-failure named.")
@backend_options("Backend to replay on. Default: the one that failed, with its options.")
@click.option("--op", "name", metavar="NAME", help="Another op of the backend, or reference.")
@click.option("--runs", type=click.IntRange(1, 1_000_000), default=1, show_default=True, help="Calls.")
def replay(
    folder: Path,
    backend: str | None,
    device: int | None,
    backend_options: tuple[str, ...],
    threads: int | None,
    name: str | None,
    runs: int,
) -> int:
    """Make one call again that was wrong: the same operands in the same layout, judged by the same truth."""
    from mla.failures import file
    from mla.failures.replay import replay as repeat

    kept = file.read(folder)
    kept.call()  # may say that there is none
    origin, facts = kept.document.origin, kept.document.call
    assert facts is not None
    if backend is None:
        backend, backend_options = origin.backend, (*origin.options, *backend_options)
    opened = open_backend(BackendOptions(backend, device, backend_options, threads))
    note(f"kept       {origin.where}: {kept.document.reason}")
    found = repeat(kept, opened.backend, name, runs)
    wrong = [reason for reason in found if reason]
    what = f"{facts.role} (op '{name or facts.op}') on {opened.backend.device}"
    if not wrong and not name:
        note("the failure did not repeat: it may depend on the calls before it, or come and go (--runs 1000)")
    if not wrong:
        out(f"{what}: right{f' in {runs} of {runs} calls' if runs > 1 else ''}\n")
        return Exit.OK
    often = f"wrong in {len(wrong)} of {runs} calls" if runs > 1 else "wrong"
    out(f"{what}: {often}: {wrong[0]}\n")
    return Exit.WRONG
