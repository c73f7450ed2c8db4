"""The command line of `python -m mla.conformance`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mla.command import files
from mla.command.backend import BackendOptions, backend_options, open_backend
from mla.command.console import note, out
from mla.command.exit_codes import Exit, carried_out, guarded
from mla.command.options import FILE, result_path
from mla.errors import UsageError
from mla.text import DTYPES

if TYPE_CHECKING:
    import torch

    from mla.conformance.outcome import Asked
    from mla.conformance.report import ConformanceReport, Slow
    from mla.conformance.suite import Instance
    from mla.conformance.trial import BackendUnderTest
    from mla_backends.api import Backend

PROGRAM = "python -m mla.conformance"

EPILOG = """\b
Examples:
  python -m mla.conformance --backend cpu
  python -m mla.conformance --backend my_module:MyBackend --only latent --dtype bfloat16
  python -m mla.conformance --backend cpu --only 'latent.heads[my_op-bfloat16]#3' --dump-failure failed
  python -m mla.conformance --backend cpu --xfails known.txt --report out.json

\b
A check is named by its id, by its group, or with wildcards: latent.heads, latent, '*.strided',
'latent.heads[my_op-bfloat16]'; #3 behind that is its third case, numbered as by --list and on the card. The
file of --xfails holds one line per expected failure, 'check: reason'.

\b
Exit codes: 0 all passed, 1 an expected failure passed, 2 usage, or a report that cannot be written, 3 backend
missing or unusable, 4 a check failed, 5 nothing ran, 130 interrupted, 143 ended by SIGTERM, 129 by SIGHUP
(the partial report is written).
"""


@click.command(epilog=EPILOG)
@click.version_option(package_name="mla")
@backend_options("Backend to check, or package.module:attribute.")
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice([*DTYPES.values()]),
    help="Check only this dtype; may be repeated.  [those the backend claims]",
)
@click.option(
    "--only", metavar="PATTERN", multiple=True, help="Run only these checks or cases; may be repeated."
)
@click.option(
    "--quick",
    is_flag=True,
    help="A smaller grid of shapes; every check still runs. Less than a minute on two CPUs.",
)
@click.option(
    "--every-case",
    is_flag=True,
    help="Run every case of dtypes that are slow on the device, too.  [a handful of each check]",
)
@click.option(
    "--xfails",
    "xfails_file",
    metavar="FILE",
    type=FILE,
    help="Expected failures, one 'check: reason' per line.",
)
@click.option(
    "--report",
    "report_file",
    metavar="FILE",
    type=FILE,
    callback=result_path,
    help="Write the report as JSON. %t is the task's number under srun or torchrun, %j the job's.",
)
@click.option(
    "--dump-failure",
    metavar="DIR",
    type=FILE,
    callback=result_path,
    help="Keep the first call of an op that is wrong in DIR, for `python -m mla.bench replay DIR`.",
)
@click.option(
    "--list",
    "list_only",
    is_flag=True,
    help="Describe every check, and stop; with --backend, list the cases of each op and dtype.",
)
@click.option(
    "-v",
    "--verbose",
    is_flag=True,
    help="Name every check on stderr before it runs, in case one ends the process; at the end, the slowest.",
)
@click.pass_obj
@carried_out
def cli(words: Sequence[str], /, **values: Any) -> int:
    """Check that a backend keeps the contract: its device, its ops, and a whole layer on it.

    Every result is compared with float64 on the host. stdout carries a report card in Markdown, fit to be
    pasted into an issue; stderr everything else.
    """
    return run(words, **values)


def run(
    words: Sequence[str],
    *,
    backend: str | None,
    device: int | None,
    backend_options: tuple[str, ...],
    threads: int | None,
    dtypes: Sequence[str],
    only: Sequence[str],
    quick: bool,
    every_case: bool,
    xfails_file: Path | None,
    report_file: Path | None,
    dump_failure: Path | None,
    list_only: bool,
    verbose: bool,
) -> int:
    """Open the backend, run the checks, print the card, write the report."""
    from mla.conformance import listing
    from mla.conformance.failures import Keeper
    from mla.conformance.outcome import make_report
    from mla.conformance.schedule import Run, steps
    from mla.conformance.xfails import Xfails

    if backend is None and not list_only:
        raise UsageError("--backend is missing; `python -m mla.bench list` shows what there is.")
    xfails = Xfails.read(xfails_file) if xfails_file else Xfails()
    _require_known(only)
    if backend is None:
        return listing.checks(only)
    if report_file:
        files.check_writable(report_file, files.RESULT)
    options = BackendOptions(backend, device, backend_options, threads)
    subject, slow = _slow(open_subject(options, quick), every_case or list_only)
    planned, asked = _plan(subject, words, _alone(options, quick), dtypes, only)
    if list_only:
        return listing.cases(planned, subject)
    keeper = Keeper.into(dump_failure, subject, backend_options, asked.alone) if dump_failure else None
    found, interrupted = Run(subject, xfails, verbose, keeper).carry_out(steps(planned, subject))
    return _conclude(make_report(asked, slow, subject, found, interrupted, xfails), report_file)


def _plan(
    subject: BackendUnderTest,
    words: Sequence[str],
    alone: list[str],
    dtypes: Sequence[str],
    only: Sequence[str],
) -> tuple[tuple[Instance, ...], Asked]:
    """Return what runs, and what was asked for. Raises `UsageError`."""
    from mla.conformance.outcome import Asked

    chosen = _dtypes(subject, dtypes)
    planned = _planned(subject, chosen, only)
    return planned, Asked(words, alone, only, _names(_claimed(subject)), _names(chosen), len(planned))


def _conclude(report: ConformanceReport, report_file: Path | None) -> Exit:
    from mla.conformance import report as reports
    from mla.conformance.outcome import verdict

    try:
        if report_file:
            reports.write(report, report_file)
    finally:  # the card must survive a disk that has filled up
        if not files.is_stdout(report_file):
            out(reports.card(report))
    return verdict(report)


def _alone(options: BackendOptions, quick: bool) -> list[str]:
    """Return the command that runs one case, without its `--only`."""
    from mla.conformance.outcome import PROGRAM

    words = [*PROGRAM, "--backend", str(options.backend)]
    words += [word for one in options.backend_options for word in ("-O", one)]
    for flag, value in (("--device", options.device), ("--threads", options.threads)):
        words += [] if value is None else [flag, str(value)]
    return [*words, *(["--quick"] * quick)]


def open_subject(options: BackendOptions, quick: bool) -> BackendUnderTest:
    """Open a backend as the runner does. Raises `UsageError`, `BackendError`."""
    from mla.conformance.trial import BackendUnderTest
    from mla_backends.registry import create

    opened, settings = open_backend(options), options.key_values()

    def reopen(more: Mapping[str, str]) -> Backend:
        return create(opened.name, {**settings, **more})

    return BackendUnderTest(opened.backend, opened.name, quick, opened.version, reopen, note)


def _require_known(patterns: Sequence[str]) -> None:
    from mla.conformance.selection import split
    from mla.conformance.xfails import require_known

    for pattern in patterns:
        require_known(split(pattern)[0], "--only")


def _slow(subject: BackendUnderTest, spare_none: bool) -> tuple[BackendUnderTest, tuple[Slow, ...]]:
    """Find the dtypes that the device is slow in, of which a handful of cases will run."""
    from mla.conformance.speed import dtypes_of, slow_dtypes

    slow = () if spare_none else slow_dtypes(subject.backend, _claimed(subject))
    return dataclasses.replace(subject, slow=dtypes_of(slow)), slow


def _claimed(subject: BackendUnderTest) -> tuple[torch.dtype, ...]:
    from mla.conformance.suite import claimed_dtypes

    return claimed_dtypes(subject)


def _names(dtypes: Sequence[torch.dtype]) -> list[str]:
    from mla.text import dtype_name

    return [dtype_name(dtype) for dtype in dtypes]


def _dtypes(subject: BackendUnderTest, names: Sequence[str]) -> tuple[torch.dtype, ...]:
    """Return the dtypes to check: the user's, which the backend must claim, or all it claims."""
    claimed = _claimed(subject)
    listed = _names(claimed)
    for name in names:
        if name not in listed:
            raise UsageError(f"the backend does not claim {name}; it claims: {', '.join(listed)}.")
    return tuple(dtype for dtype, name in zip(claimed, listed, strict=True) if not names or name in names)


def _planned(
    subject: BackendUnderTest, dtypes: Sequence[torch.dtype], only: Sequence[str]
) -> tuple[Instance, ...]:
    """Return what runs. Raises `UsageError` where a check or a case is not there."""
    from mla.conformance.selection import nothing_matches, require_cases
    from mla.conformance.suite import instances

    planned = instances(subject, dtypes, only)
    if not planned:
        raise nothing_matches(only, [one.id for one in instances(subject, dtypes)])
    require_cases(planned, subject)
    return planned


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    return guarded(lambda: cli.main(words, prog_name=PROGRAM, standalone_mode=False, obj=words))
