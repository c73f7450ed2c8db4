"""The command line of `python -m mla.bench`: its commands, and what happens to words that name none."""

from __future__ import annotations

import sys

import click

from mla.bench.cli import (
    capacity,
    ceilings,
    compare,
    doctor,
    export,
    new_backend,
    replay,
    report,
    run,
    show,
)
from mla.bench.cli import list as list_command
from mla.command.exit_codes import carried_out, guarded
from mla.errors import did_you_mean


class DefaultGroup(click.Group):
    """A group whose options without a command mean `run`, and whose help shows the options of `run`."""

    default = "run"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `run` in front of anything that starts with an option."""
        for word in args:
            if word != word.encode(errors="replace").decode():  # it could not be written to a result
                raise click.UsageError(f"argument {word!a} is not valid UTF-8.")
        if not args or (args[0].startswith("-") and args[0] not in ("--help", "--version")):
            args = [self.default, *args]
        elif args[0] == "--help":
            args = [self.default, "--help"]
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or say which one was probably meant."""
        if args[0] not in self.commands:
            hint = did_you_mean(args[0], list(self.commands))
            known = ", ".join(self.commands)
            raise click.UsageError(f"there is no command '{args[0]}'.{hint} Commands: {known}.")
        return super().resolve_command(ctx, args)


@click.group(cls=DefaultGroup)
@click.version_option(package_name="mla")
def cli() -> None:
    """Measure MLA on an accelerator."""


for command in (
    run.run,
    list_command.list_backends,
    doctor.doctor,
    new_backend.new_backend,
    compare.compare,
    show.show,
    report.report,
    export.export,
    replay.replay,
    ceilings.ceilings,
    capacity.capacity_command,
):
    assert command.callback is not None
    command.callback = carried_out(command.callback)
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    return guarded(lambda: cli.main(words, prog_name="python -m mla.bench", standalone_mode=False))
