"""Options about a run's course: where its result goes, what it goes on from, and what ends it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from mla.bench.workload.quantities import duration
from mla.command import launcher, options

Command = TypeVar("Command", bound=Callable[..., Any])


def _result_path(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """Give every task of a launcher a file of its own."""
    return None if value is None else launcher.result_path(value)


def _duration(ctx: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """Read "10m" as 600.0."""
    try:
        return None if value is None else duration(value)
    except ValueError as error:
        raise click.BadParameter(f"{error}.") from error


_OPTIONS = (
    click.option(
        "-o",
        "--output",
        metavar="FILE",
        type=click.Path(path_type=Path),
        callback=_result_path,
        help="Write the complete result as JSON. %t is the task's number under srun or torchrun, %j the "
        "job's.",
    ),
    click.option(
        "--resume",
        metavar="FILE",
        type=click.Path(path_type=Path),
        callback=_result_path,
        help="Go on with the run in this result file: its complete cases are kept; without -o it is "
        "rewritten.",
    ),
    click.option(
        "--budget",
        metavar="TIME",
        callback=_duration,
        help="Stay inside this time, such as 90s, 10m or 1h: what does not fit is left out.",
    ),
    click.option(
        "--hang-after",
        metavar="TIME",
        callback=_duration,
        default="10m",
        show_default=True,
        help="End the run, keeping what there is, when no forward finishes for so long.",
    ),
    click.option(
        "--baseline",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="Compare with this result file afterwards.",
    ),
    click.option(
        "--fail-slower",
        metavar="PERCENT",
        callback=options.percent,
        help="Exit 1 if a case is surely slower than the baseline by more.",
    ),
)


def course_options(command: Command) -> Command:
    """Add these options in their order."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
