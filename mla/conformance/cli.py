"""The command line of `python -m mla.conformance`."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mla.command import environment, files
from mla.command.backend import BackendOptions, backend_options, open_backend
from mla.command.console import note, out
from mla.command.exit_codes import Exit, guarded
from mla.command.exit_codes import interrupted as ended_early
from mla.command.options import FILE, result_path
from mla.command.progress import Progress
from mla.errors import UsageError
from mla.text import DTYPES

if TYPE_CHECKING:
    import torch

    from mla.conformance.failures import Keeper
    from mla.conformance.report import CheckResult, ConformanceReport
    from mla.conformance.suite import Instance
    from mla.conformance.trial import BackendUnderTest
    from mla.conformance.xfails import Xfails
    from mla_backends.api import Backend

PROGRAM = "python -m mla.conformance"

EPILOG = """\b
Examples:
  python -m mla.conformance --backend cpu
  python -m mla.conformance --backend my_module:MyBackend --only latent --dtype bfloat16
  python -m mla.conformance --backend cpu --xfails known.txt --report out.json

\b
A check is named by its id, by its group, or with wildcards: latent.heads, latent, '*.strided',
'latent.heads[my_op-bfloat16]'. The file of --xfails holds one line per expected failure, 'check: reason'.

\b
Exit codes: 0 all passed, 1 an expected failure passed, 2 usage, 3 backend missing or unusable,
4 a check failed, 5 nothing ran, 130 interrupted, 143 ended by SIGTERM (the partial report is written).
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
@click.option("--only", metavar="PATTERN", multiple=True, help="Run only these checks; may be repeated.")
@click.option(
    "--quick",
    is_flag=True,
    help="A smaller grid of shapes; every check still runs. Half a minute on two CPUs, minutes on old ones.",
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
@click.option("--list", "list_only", is_flag=True, help="Describe every check, and stop.")
@click.option(
    "-v",
    "--verbose",
    is_flag=True,
    help="Name every check on stderr before it runs, in case one ends the process.",
)
@click.pass_obj
def cli(words: Sequence[str], /, **values: Any) -> int:
    """Check that a backend keeps the contract: its device, its ops, and a whole layer on it.

    Every result is compared with float64 on the host. stdout carries a report card in Markdown, fit to be
    pasted into an issue; stderr everything else.
    """
    if values["list_only"]:
        return list_checks(values["only"])
    return run(words, **values)


def list_checks(only: Sequence[str]) -> int:
    """Print id, description and bug of every check."""
    from mla.conformance.registry import all_checks, matches

    _require_known(only)
    for one in all_checks():
        if not only or any(matches(pattern.partition("[")[0], one.id) for pattern in only):
            out(f"{one.id}\n  {one.description}\n  Catches {one.catches}.\n")
    return Exit.OK


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
    xfails_file: Path | None,
    report_file: Path | None,
    dump_failure: Path | None,
    list_only: bool,
    verbose: bool,
) -> int:
    """Open the backend, run the checks, print the card, write the report."""
    from mla.conformance import report as reports
    from mla.conformance.failures import Keeper
    from mla.conformance.suite import instances
    from mla.conformance.xfails import Xfails

    if backend is None:
        raise UsageError("--backend is missing; `python -m mla.bench list` shows what there is.")
    xfails = Xfails.read(xfails_file) if xfails_file else Xfails()
    _require_known(only)
    if report_file:
        files.check_writable(report_file)
    subject = open_subject(BackendOptions(backend, device, backend_options, threads), quick)
    chosen = _dtypes(subject, dtypes)
    planned = instances(subject, chosen, only)
    if not planned:
        raise UsageError(f"no check of this backend matches --only {' '.join(only)}.")
    keeper = Keeper.into(dump_failure, subject, backend_options, words) if dump_failure else None
    found, interrupted = carry_out_all(planned, subject, xfails, verbose, keeper)
    report = make_report(words, subject, chosen, len(planned), found, interrupted, xfails)
    try:
        if report_file:
            reports.write(report, report_file)
    finally:  # the card must survive a disk that has filled up
        out(reports.card(report))
    return verdict(report)


def open_subject(options: BackendOptions, quick: bool) -> BackendUnderTest:
    """Open a backend as the runner does. Raises `UsageError`, `BackendError`."""
    from mla.conformance.trial import BackendUnderTest
    from mla_backends.registry import create

    opened, settings = open_backend(options), options.key_values()

    def reopen(more: Mapping[str, str]) -> Backend:
        return create(opened.name, {**settings, **more})

    return BackendUnderTest(opened.backend, opened.name, quick, opened.version, reopen, note)


def _require_known(patterns: Sequence[str]) -> None:
    from mla.conformance.xfails import require_known

    for pattern in patterns:
        require_known(pattern, "--only")


def _dtypes(subject: BackendUnderTest, names: Sequence[str]) -> tuple[torch.dtype, ...]:
    """Return the dtypes to check: the user's, which the backend must claim, or all it claims."""
    from mla.conformance.suite import claimed_dtypes
    from mla.text import dtype_name

    claimed = claimed_dtypes(subject)
    listed = [dtype_name(dtype) for dtype in claimed]
    for name in names:
        if name not in listed:
            raise UsageError(f"the backend does not claim {name}; it claims: {', '.join(listed)}.")
    return tuple(dtype for dtype, name in zip(claimed, listed, strict=True) if not names or name in names)


def carry_out_all(
    planned: Sequence[Instance],
    subject: BackendUnderTest,
    xfails: Xfails,
    verbose: bool = False,
    keeper: Keeper | None = None,
) -> tuple[list[CheckResult], bool]:
    """Run checks with a progress bar; return the results so far and whether the user ended it."""
    from mla.conformance.suite import carry_out

    found: list[CheckResult] = []
    with Progress(len(planned)) as progress:
        try:
            for one in planned:
                if verbose:
                    note(one.id)
                progress.advance(one.id, 0)
                found.append(carry_out(one, subject, xfails))
                if keeper is not None:
                    keeper.see(one, found[-1])
                progress.advance(one.id, 1)
        except KeyboardInterrupt:
            return found, True
    return found, False


def make_report(
    words: Sequence[str],
    subject: BackendUnderTest,
    dtypes: Sequence[torch.dtype],
    planned: int,
    found: list[CheckResult],
    interrupted: bool,
    xfails: Xfails,
) -> ConformanceReport:
    """Put the results together with what they depend on."""
    from mla.conformance.report import SCHEMA_VERSION, CheckedBackend, ConformanceReport
    from mla.text import dtype_name

    return ConformanceReport(
        schema_version=SCHEMA_VERSION,
        argv=["python", "-m", "mla.conformance", *words],
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        git_commit=environment.git_commit(),
        interrupted=interrupted,
        quick=subject.quick,
        backend=CheckedBackend(
            name=subject.name,
            version=subject.version,
            device=str(subject.backend.device),
            device_name=_device_name(subject),
        ),
        environment=_environment(subject),
        dtypes=[dtype_name(dtype) for dtype in dtypes],
        planned=planned,
        checks=found,
        unused_xfails=xfails.unused(),
    )


def _device_name(subject: BackendUnderTest) -> str:
    try:
        return str(subject.backend.device_info().name)
    except Exception:  # noqa: BLE001  # device.info reports it; the card must come out all the same
        return "unknown"


def _environment(subject: BackendUnderTest) -> dict[str, str]:
    try:
        return environment.environment(subject.backend)
    except Exception as error:  # noqa: BLE001  # device.environment reports it
        return {"environment": f"unknown: {type(error).__name__}"}


def verdict(report: ConformanceReport) -> Exit:
    """Return the exit code."""
    counts = report.counts()
    if report.interrupted:
        return ended_early()
    if counts["fail"]:
        return Exit.WRONG
    if counts["xpass"]:
        return Exit.REGRESSION
    return Exit.OK if counts["pass"] + counts["xfail"] else Exit.NOTHING_RAN


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    return guarded(lambda: cli.main(words, prog_name=PROGRAM, standalone_mode=False, obj=words))
