"""The command line of `python -m mla.bench`: its commands, and what happens to words that name none."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from mla.bench.cli import ceilings, devices, report, run, stored
from mla.command import console, launcher
from mla.command.exit_codes import carried_out, guarded
from mla.errors import did_you_mean


def _unreadable(word: str) -> str:
    try:
        os.fsencode(word).decode()
    except UnicodeError:
        return "is not valid UTF-8"
    return "is UTF-8, and this locale is not: set LC_ALL=C.UTF-8"


class DefaultGroup(click.Group):
    """A group whose options without a command mean `run`, and whose help shows the options of `run`.

    No word at all asks for help: a run takes minutes, and nobody has said of what.
    """

    default = "run"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `run` in front of anything that starts with an option."""
        for word in args:
            if word != word.encode(errors="replace").decode():  # it could not be written to a result
                raise click.UsageError(f"argument {word!a} {_unreadable(word)}.")
        if not args or args[0] == "--help":
            args = [self.default, "--help"]
        elif args[0].startswith("-") and args[0] != "--version":
            args = [self.default, *args]
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
    devices.list_backends,
    devices.doctor,
    devices.new_backend,
    stored.compare,
    stored.show,
    report.report,
    stored.export,
    devices.replay,
    ceilings.ceilings,
    devices.capacity_command,
):
    assert command.callback is not None
    command.callback = carried_out(command.callback)
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = sys.argv[1:] if arguments is None else arguments

    def command() -> int | None:
        if _on_ranks(words):
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a page of frames for a closed connection
            console.become(launcher.rank() or 0)
        return cli.main(words, prog_name="python -m mla.bench", standalone_mode=False)

    console.become(0)
    code = guarded(command)
    if code and _on_ranks(words):
        _tell_ranks(code)
    return code


def _on_ranks(words: Sequence[str]) -> bool:
    return any(word.partition("=")[0] == "--parallel" for word in words)


def _tell_ranks(code: int) -> None:
    """Let other ranks know why this one ended before it met them."""
    sentence = console.complaint()
    try:
        from mla.bench.ranks.launch import leave_word

        heard = leave_word(sentence, code)
    except Exception:  # noqa: BLE001  # without a usable torch there is no way to tell them
        heard = False
    if not heard:
        console.insist()
