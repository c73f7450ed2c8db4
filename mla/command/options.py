"""What the options and arguments of several commands share: how words are read, and how help shows them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
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


class Option(click.Option):
    """An option with a group in the help; `common`: among those that most people need first."""

    def __init__(self, *words: Any, group: str, common: bool = False, **attributes: Any) -> None:
        super().__init__(*words, **attributes)
        self.group, self.common = group, common

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        """Return flags and sentence; ranges are left to errors, aliases to the sentence."""
        short = [flag for flag in self.opts if not flag.startswith("--")]
        flags = short + [flag for flag in self.opts if flag not in short][:1]
        words = ", ".join(flags) + ("" if self.is_flag else f" {self.metavar or 'N'}")
        default = self.default if self.show_default is True else self.show_default
        return words, (self.help or "") + (f"  [default: {default}]" if self.show_default else "")


# The groups of options, in the order of the help.
what_to_run = partial(click.option, cls=Option, group="What to run")
how = partial(click.option, cls=Option, group="How")
scale = partial(click.option, cls=Option, group="Variants and scale")
output = partial(click.option, cls=Option, group="Output")
evidence = partial(click.option, cls=Option, group="Limits and evidence")

# Both name the whole help of a command; `mla.bench --help` alone is shorter.
HELP_NAMES = {"help_option_names": ["--help", "--help-all"]}
# Columns of the flags, in every group alike.
_FLAGS = 24


def write_groups(
    ctx: click.Context, formatter: click.HelpFormatter, options: Iterable[click.Parameter]
) -> None:
    """Write options by group; click's own, such as --help, belong to the output."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for option in options:
        flags, sentence = option.get_help_record(ctx) or ("", "")
        groups.setdefault(getattr(option, "group", "Output"), []).append((flags.ljust(_FLAGS), sentence))
    for title, rows in groups.items():
        with formatter.section(title):
            formatter.write_dl(rows)


class GroupedCommand(click.Command):
    """A command whose help shows its options by group."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the groups."""
        write_groups(ctx, formatter, self.get_params(ctx))


def program(module: str) -> str:
    """Return how this process was started: by its script, which completion goes by, or by `python -m`."""
    script = module.replace(".", "-")
    return script if Path(sys.argv[0]).stem == script else f"python -m {module}"


# How much a run prints; without either, what a first look needs.
DETAIL = (
    output("-v", "--verbose", "detail", common=True, flag_value="verbose", help="Print all details."),
    output("-q", "--quiet", "detail", common=True, flag_value="quiet", help="Print the headlines only."),
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
