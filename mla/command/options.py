"""What the options and arguments of several commands share: how words are read, and how help shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from mla.command import launcher

Command = TypeVar("Command", bound=Callable[..., Any])
Callback = Callable[[click.Context, click.Parameter, "str | None"], Any]

FILE = click.Path(path_type=Path)


class Word(click.Argument):
    """An argument that explains itself in the help, as options do."""

    def __init__(self, names: Sequence[str], *, help: str, **attributes: Any) -> None:
        super().__init__(names, **attributes)
        self.help = help

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        """Return name and explanation."""
        return self.human_readable_name, self.help or ""


# How much a run prints; without either, what a first look needs.
DETAIL = (
    click.option("-v", "--verbose", "detail", flag_value="verbose", help="Print everything that is known."),
    click.option("-q", "--quiet", "detail", flag_value="quiet", help="Print the headlines alone."),
)


def add_options(options: Sequence[Callable[[Any], Any]]) -> Callable[[Command], Command]:
    """Return a decorator that adds click options to a command, in their order."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def parsed_by(parse: Callable[[str], Any]) -> Callback:
    """Return a click callback that reads a value with `parse`, whose ValueError names the mistake."""

    def read(ctx: click.Context, parameter: click.Parameter, value: str | None) -> Any:
        try:
            return None if value is None else parse(value)
        except ValueError as error:
            raise click.BadParameter(f"{str(error).rstrip('.')}.") from error

    return read


def percent(text: str) -> float:
    """Read "3%" or "3" as 0.03. Raises ValueError."""
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not 0 <= share < 10:
        raise ValueError(f"'{text}' is not a valid percentage, such as 3%.")
    return share


def result_path(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """Give every task of a launcher a result file of its own; ranks of one run share theirs.

    Raises `LaunchError`.
    """
    shared = ctx.params.get("parallel") is not None
    return None if value is None else launcher.result_path(value, shared)
