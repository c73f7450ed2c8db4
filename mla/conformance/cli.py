"""The command line of `python -m mla.conformance`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click

import mla
from mla.command import files
from mla.command.console import out
from mla.command.exit_codes import carried_out, guarded
from mla.command.options import (
    FILE,
    HELP_NAMES,
    BackendOptions,
    Dtype,
    GroupedCommand,
    how,
    output,
    program,
    result_path,
    takes,
    what_to_run,
)
from mla.errors import UsageError
from mla.text import DTYPES

if TYPE_CHECKING:
    from mla.conformance.suite import Suite

LEAST_PYTEST = (8,)
EPILOG = """\b
Examples:
  mla-conformance --backend cpu
  mla-conformance --backend my_module:MyBackend --only latent
  mla-conformance --backend cpu --only 'latent.tiles[my_op-bfloat16]#3'
  mla-conformance --backend cpu --xfails known.txt --report out.json

A check is named by its id, its group, or with wildcards: latent.tiles, latent, '*.drawn',
'latent.tiles[my_op-bfloat16]'; #3 behind that is its third case, numbered as by --list and on the card.

\b
The checks are tests of pytest, which must be installed. With its own options:
  pytest --pyargs mla.conformance --mla-backend cpu -k latent -x

\b
Exit codes:
  0 all passed; the last line of the card counts fixed cases that time was
    too short for
  1 an expected failure passed
  2 usage, or a report that cannot be written
  3 backend missing or unusable
  4 a check failed
  5 nothing ran
  7 incomplete: all is right, but fewer than 300 drawn cases of an op in a
    dtype were judged (never with --quick, which is a first look)
  130 interrupted, 143 ended by SIGTERM, 129 by SIGHUP (the partial report is
    written)
"""


def _finite(context: click.Context, parameter: click.Parameter, minutes: float | None) -> float | None:
    if minutes is None or minutes < float("inf"):  # which NaN is not
        return minutes
    raise UsageError(f"--minutes {minutes} is not a time, such as 0.5 or 10.")


@dataclass(frozen=True)
class Options(BackendOptions):
    """What a command line asks for."""

    # fmt: off
    backend: Annotated[str | None, what_to_run(
        "--backend", metavar="NAME", common=True, help="Backend to check, or package.module:attribute.",
    )]
    dtypes: Annotated[tuple[str, ...], what_to_run(
        "--dtype", "dtypes", metavar="DTYPE", multiple=True, type=Dtype(),
        show_default="all that the backend claims",
        help=f"Check only this dtype ({', '.join(DTYPES)}); repeatable.",
    )]
    only: Annotated[tuple[str, ...], what_to_run(
        "--only", metavar="PATTERN", multiple=True, help="Run only these checks or cases; repeatable.",
    )]
    quick: Annotated[bool, how(
        "--quick", is_flag=True,
        help="A first look of about a minute: the same fixed checks, and fewer drawn cases.",
    )]
    minutes: Annotated[float | None, how(
        "--minutes", type=click.FloatRange(0, min_open=True), callback=_finite,
        show_default="5, or 1 with --quick",
        help="Duration: fixed checks in the first part, drawn cases in the rest.",
    )]
    draws: Annotated[int | None, how(
        "--draws", type=click.IntRange(0),
        help="Cases drawn per op and dtype, next to all fixed ones, in place of --minutes.",
    )]
    seed: Annotated[int, how(
        "--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of drawn cases.",
    )]
    xfails: Annotated[Path | None, how(
        "--xfails", metavar="FILE", type=FILE, help="Expected failures, one 'check: reason' per line.",
    )]
    report: Annotated[Path | None, output(
        "--report", metavar="FILE", type=FILE, callback=result_path,
        help="Save the report as JSON; %t is the task number under srun or torchrun, %j the job's.",
    )]
    dump_failure: Annotated[Path | None, output(
        "--dump-failure", metavar="DIR", type=FILE, callback=result_path,
        help="Keep the first wrong call in DIR, for `mla-bench replay DIR`.",
    )]
    list_only: Annotated[bool, output(
        "--list", "list_only", is_flag=True,
        help="Describe every check, or with --backend its cases; then exit.",
    )]
    verbose: Annotated[bool, output(
        "-v", "--verbose", is_flag=True,
        help="Name every check on stderr before it runs, and the slowest at the end.",
    )]
    # fmt: on


@click.command(cls=GroupedCommand, epilog=EPILOG, context_settings=HELP_NAMES)
@carried_out
@takes(Options)
@click.version_option(mla.__version__)
def cli(options: Options) -> int:
    """Check that a backend keeps the contract: its device, its ops, and a whole layer on it.

    Every result is compared with float64 on the host. stdout carries a report card in Markdown, fit to be
    pasted into an issue; stderr everything else.
    """
    from mla.conformance import selection

    if options.backend is None and not options.list_only:
        raise UsageError("--backend is missing; `mla-bench list` shows the backends.")
    xfails = selection.Xfails.read(options.xfails) if options.xfails else selection.Xfails()
    for pattern in options.only:
        selection.require_known(selection.split(pattern)[0], "--only")
    if options.backend is None:
        return selection.list_checks(options.only)
    if options.report:
        files.check_writable(options.report, files.RESULT)
    if not options.list_only:
        _require_pytest()
    from mla.conformance.failures import Keeper
    from mla.conformance.suite import Asked, Suite, require_hypothesis

    if not options.list_only and options.draws != 0:
        require_hypothesis()
    how_long = (options.quick, options.minutes, options.draws, options.seed)
    words, started = click.get_current_context().obj
    suite = Suite.opened(Asked(options, options.dtypes, options.only, *how_long), xfails)
    suite.start = started
    if options.list_only:
        return selection.list_cases(suite.planned, suite.subject)
    if options.dump_failure:
        suite.keeper = Keeper.into(options.dump_failure, suite)
    return _run(suite, words, options.report, options.verbose)


def _run(suite: Suite, words: Sequence[str], report_file: Path | None, verbose: bool) -> int:
    """Run the checks, print the card and write the report; return the exit code."""
    from mla.conformance.card import card
    from mla.conformance.report import write
    from mla.conformance.run import carry_out, verdict

    report = carry_out(suite, words, verbose)
    try:
        if report_file:
            write(report, report_file)
    finally:  # the card must survive a disk that has filled up
        if not files.is_stdout(report_file):
            out(card(report))
    return verdict(report)


def _require_pytest() -> None:
    try:
        import pytest

        here = getattr(pytest, "version_tuple", (0,))  # which pytest 6 lacks
        problem = "" if here >= LEAST_PYTEST else f"version {pytest.__version__} is installed"
    except ImportError:
        problem = "it is not installed"
    if problem:
        least = LEAST_PYTEST[0]
        raise UsageError(
            f"the suite needs pytest {least} or later, and {problem}: `pip install 'pytest>={least}'` "
            "(it comes with `mla-bench[conformance]`)."
        )


def main(arguments: list[str] | None = None, started: float | None = None) -> int:
    """Run the command line and return its exit code. `started`: when it began, by `time.monotonic`."""
    words = sys.argv[1:] if arguments is None else arguments
    command = words, time.monotonic() if started is None else started
    return guarded(
        lambda: cli.main(words, prog_name=program("mla.conformance"), standalone_mode=False, obj=command)
    )
