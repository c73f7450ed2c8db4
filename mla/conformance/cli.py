"""The command line of `python -m mla.conformance`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import msgspec

import mla
from mla.command import files
from mla.command.console import out
from mla.command.exit_codes import Exit, carried_out, guarded, interrupted
from mla.command.options import (
    DTYPE,
    FILE,
    HELP_NAMES,
    BackendOptions,
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
    from mla.conformance.report import ConformanceReport
    from mla.conformance.suite import Suite

MINUTES = {True: 1.0, False: 5.0}  # that a run takes, if it is quick and if not
ENDING = 1.5  # seconds of it that are left for the card, and for the process to end
EPILOG = """\b
Examples:
  mla-conformance --backend cpu
  mla-conformance --backend my_module:MyBackend --only latent
  mla-conformance --backend cpu --only 'latent.tiles[my_op-bfloat16]#3'
  mla-conformance --backend cpu --xfails known.txt --report out.json

A check is named by its id, its group, or with wildcards: latent.tiles, latent, '*.drawn',
'latent.tiles[my_op-bfloat16]'; #3 behind that is its third case, numbered as by --list and on the card.

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
        "--dtype", "dtypes", metavar="DTYPE", multiple=True, type=DTYPE,
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

    @property
    def seconds(self) -> float:
        """How long checks may take."""
        return 60 * (MINUTES[self.quick] if self.minutes is None else self.minutes) - ENDING

    @property
    def alone(self) -> list[str]:
        """The command that runs one case, without its `--only`."""
        words = ["python", "-m", "mla.conformance", "--backend", str(self.backend)]
        words += [word for option in self.backend_options for word in ("-O", option)]
        for name in ("device", "threads", "seed", "minutes", "draws"):
            value = getattr(self, name)
            if value is not None and (name, value) != ("seed", 0):
                words += [f"--{name}", f"{value:g}" if name == "minutes" else str(value)]
        return words + ["--quick"] * self.quick


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
    from mla.conformance.suite import Suite, require_hypothesis

    if not options.list_only and options.draws != 0:
        require_hypothesis()
    words, started = click.get_current_context().obj
    suite = Suite.opened(options, xfails, started)
    if options.list_only:
        return selection.list_cases(suite.planned)
    return _run(suite, words)


def _run(suite: Suite, words: Sequence[str]) -> int:
    """Run the checks, print the card and write the report; return the exit code."""
    from mla.conformance.card import card

    options = suite.options
    report = suite.run(words)
    try:
        if options.report:
            data = msgspec.json.format(msgspec.json.encode(report), indent=1)
            files.write_bytes(data + b"\n", options.report)
    finally:  # the card must survive a disk that has filled up
        if not files.is_stdout(options.report):
            out(card(report))
    return _verdict(report)


def _verdict(report: ConformanceReport) -> Exit:
    """Return the exit code."""
    counts = report.counts()
    if report.interrupted:
        return interrupted()
    if counts["fail"]:
        return Exit.WRONG
    if counts["xpass"]:
        return Exit.REGRESSION
    if counts["incomplete"] and not report.quick:  # a first look is not meant to be complete
        return Exit.INCOMPLETE
    return Exit.OK if counts["pass"] + counts["xfail"] + counts["incomplete"] else Exit.NOTHING_RAN


def main(arguments: list[str] | None = None, started: float | None = None) -> int:
    """Run the command line and return its exit code. `started`: when it began, by `time.monotonic`."""
    words = sys.argv[1:] if arguments is None else arguments
    command = words, time.monotonic() if started is None else started
    return guarded(
        lambda: cli.main(words, prog_name=program("mla.conformance"), standalone_mode=False, obj=command)
    )
