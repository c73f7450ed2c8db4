"""What the options and arguments of several commands share: how words are read, and how help shows them.

And the backend that they name, opened in the same way, with the same options, for every command.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast, get_type_hints

import click

from mla.command import launcher
from mla.command.console import note
from mla.command.last_words import while_loading
from mla.errors import UsageError
from mla.text import counted, named_dtype
from mla_backends import BackendError, host, probe
from mla_backends.known import GENERAL
from mla_backends.registry import locate

if TYPE_CHECKING:
    from mla_backends.api import Backend

Command = TypeVar("Command", bound=Callable[..., Any])
Record = TypeVar("Record")

FILE = click.Path(path_type=Path)


class Read(click.types.StringParamType):
    """What `parse` makes of a word, whose ValueError or `UsageError` names the mistake."""

    def __init__(self, parse: Callable[[str], Any]) -> None:
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return what was read; what was already is as it is."""
        try:
            return self._parse(value) if isinstance(value, str) else value
        except (UsageError, ValueError) as error:
            self.fail(f"{str(error).rstrip('.')}.", param, ctx)


# A dtype by its short name or torch's, read as torch's: bf16 and bfloat16 are one word.
DTYPE = Read(named_dtype)


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


def format_option(kinds: Sequence[str], text: str) -> Callable[[Command], Command]:
    """Return the option --format, `text` in the help, whose default is the first of its kinds."""
    kind = click.Choice(kinds)
    return click.option("--format", "kind", type=kind, default=kinds[0], show_default=True, help=text)


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

    Raises `UsageError`.
    """
    shared = ctx.params.get("parallel") is not None
    return None if value is None else launcher.result_path(value, shared)


# ----------------------------------------------------------------------------------------------- the backend


@dataclass(frozen=True)
class BackendOptions:
    """The options that choose and configure a backend."""

    # fmt: off
    backend: Annotated[str | None, what_to_run(
        "--backend", metavar="NAME", common=True,
        help="Backend (see `list`), or package.module:attribute. Default: the only usable one.",
    )]
    device: Annotated[int | None, how(
        "--device", metavar="INDEX", type=click.IntRange(0, 65535), help="Device index.",
        show_default="LOCAL_RANK, SLURM_LOCALID, or the current one",
    )]
    backend_options: Annotated[tuple[str, ...], how(
        "-O", "backend_options", metavar="KEY=VALUE", multiple=True, help="Backend option; repeatable.",
    )]
    threads: Annotated[int | None, how(
        "--threads", type=click.IntRange(1, 4096), common=True, show_default="chosen by the backend",
        help="Host threads.",
    )]
    # fmt: on


def declared(record: type) -> list[Callable[[Any], Any]]:
    """Return the click options that a dataclass's fields are annotated with, in their order."""
    hints = get_type_hints(record, include_extras=True).values()
    return [option for hint in hints for option in getattr(hint, "__metadata__", ())]


def takes(record: Callable[..., Record]) -> Callable[[Callable[[Record], int]], Callable[..., int]]:
    """Return a decorator for a command that takes the options of a dataclass's fields, as that record."""

    def add(command: Callable[[Record], int]) -> Callable[..., int]:
        @functools.wraps(command)
        def called(**values: Any) -> int:
            return command(record(**values))

        return add_options(declared(cast("type", record)))(called)

    return add


@dataclass(frozen=True)
class OpenedBackend:
    """A backend whose device is set up, under the name that the user gave."""

    backend: Backend
    name: str
    version: str | None  # of the distribution that brings it
    device: int | None  # the index to repeat: given, or chosen by the launcher


def backend_options(help: str) -> Callable[[Command], Command]:
    """Return a decorator that adds --backend, with `help`, --device, -O and --threads to a click command."""
    named = what_to_run("--backend", metavar="NAME", common=True, help=help)
    return add_options([named, *declared(BackendOptions)[1:]])


def open_backend(options: BackendOptions) -> OpenedBackend:
    """Find, probe and set up the backend on this task's device.

    Raises `UsageError` or a `BackendError`; there is no fallback.
    """
    import mla

    settings = key_values(options.backend_options)
    name = only_usable() if options.backend is None else options.backend
    index = launcher.local_device(note) if options.device is None else options.device
    with while_loading(name):
        backend: Backend = mla.load_backend(name, index, options.threads, settings)
    for remark in backend.remarks():
        note(remark)
    import torch

    threads, cpus = torch.get_num_threads(), host.cpu_limit()
    if threads > cpus:
        note(
            f"{threads} host threads share {counted(cpus, 'CPU')}: they wait for each other, and "
            f"times are long and uneven; --threads {cpus} gives each a CPU of its own"
        )
    device = options.device
    if device is None and launcher.local_number() is not None and backend.device is not None:
        device = backend.device.index  # commands that repeat this run need no launcher then
    return OpenedBackend(backend, name, locate(name).version, device)


def only_usable() -> str:
    """Return the one usable backend; `GENERAL` only where no plugin's is.

    Raises `UsageError` where several are usable, and `BackendError` where none is.
    """
    backends = probe.statuses()
    if not any(status.state == probe.USABLE for status in backends):
        backends.append(probe.status(GENERAL))
    usable = [status.name for status in backends if status.state == probe.USABLE]
    if len(usable) > 1:
        raise UsageError(f"several backends are usable: {', '.join(usable)}. Choose one with --backend.")
    if not usable:
        states = "; ".join(f"{status.name} ({status.state})" for status in backends)
        raise BackendError(f"no backend is usable: {states}. `mla-bench list` says why.")
    note(f"using backend '{usable[0]}', the only usable one")
    return usable[0]


def key_values(options: Sequence[str]) -> dict[str, str]:
    """Split `-O` options at their "=". Raises `UsageError`."""
    pairs = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not key or not equals:
            raise UsageError(f"-O takes KEY=VALUE, got '{option}'.")
        pairs[key] = value
    return pairs
