"""The command line of `python -m mla.bench`: its commands, and what happens to words that name none."""

from __future__ import annotations

import contextlib
import os
import sys

import click
from click.shell_completion import CompletionItem

import mla
from mla.bench.cli import devices, run, stored
from mla.command import console, launcher
from mla.command.exit_codes import carried_out, guarded
from mla.command.options import program, write_groups
from mla.errors import unknown

EPILOG = """
Everything else: --help-all

Exit codes: 0 ok, 1 regression, 2 usage, 3 backend unusable or op failed, 4 wrong result, 5 nothing ran,
6 suspect timing, 130 interrupted, 143 ended by SIGTERM, 129 by SIGHUP.
"""


class DefaultGroup(click.Group):
    """A group whose options without a command mean `run`, and whose help shows the common options of `run`.

    No word at all asks for help: a run takes minutes, and nobody has said of what.
    """

    default = "run"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `run` in front of anything that starts with an option."""
        for word in args:
            if word != word.encode(errors="replace").decode():  # it could not be written to a result
                raise click.UsageError(
                    f"argument {word!a} is not valid UTF-8, or not in this locale (LC_ALL)."
                )
        if not args and not ctx.resilient_parsing:  # which is that of shell completion
            args = ["--help"]
        elif args and args[0].startswith("-") and args[0] not in ("--help", "--version"):
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, and the options of `run` that most people need first."""
        with formatter.section("Commands"):
            rows = [(name, command.get_short_help_str()) for name, command in self.commands.items()]
            formatter.write_dl(rows)
        options = self.commands[self.default].params
        write_groups(ctx, formatter, [option for option in options if getattr(option, "common", False)])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete commands, and the options of `run`, which need none."""
        items = super().shell_complete(ctx, incomplete)
        if incomplete.startswith("-"):
            default = self.commands[self.default]
            items += default.shell_complete(click.Context(default, parent=ctx), incomplete)
        return items

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or say which one was probably meant."""
        if args[0] not in self.commands:
            raise click.UsageError(unknown("command", args[0], list(self.commands), "Commands"))
        return super().resolve_command(ctx, args)


@click.group(cls=DefaultGroup, options_metavar="[COMMAND]", subcommand_metavar="[OPTIONS]", epilog=EPILOG)
@click.version_option(mla.__version__)
def cli() -> None:
    """Measure DeepSeek's Multi-head Latent Attention (MLA): a layer, or one op."""


for command in (
    run.run,
    devices.list_backends,
    devices.doctor,
    stored.compare,
    stored.report,
    stored.show,
    stored.export,
    devices.replay,
    devices.ceilings,
    devices.new_backend,
):
    assert command.callback is not None
    command.callback = carried_out(command.callback)
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    on_ranks = any(word.partition("=")[0] == "--parallel" for word in words)

    def command() -> int | None:
        if on_ranks:
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a page of frames for a closed connection
            console.become(launcher.rank() or 0)
        return cli.main(words, prog_name=program("mla.bench"), standalone_mode=False)

    console.become(0)
    code = guarded(command)
    if code and on_ranks:  # others are to know why this one ended before it met them
        heard = False
        with contextlib.suppress(Exception):  # without a usable torch there is no way to tell them
            from mla.bench.ranks.launch import leave_word

            heard = leave_word(console.complaint(), code)
        if not heard:
            console.insist()
    return code
