"""The command line of `python -m mla.bench`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from mla.bench import commands
from mla.bench.exits import guarded
from mla.bench.options import RunOptions
from mla.bench.render import FORMATS
from mla.bench.workload import MAX_COUNT, STANDARD
from mla.errors import did_you_mean

EPILOG = """\b
Examples:
  python -m mla.bench --backend cpu
  python -m mla.bench --backend cpu --config deepseek-r1 --runs 10 -o run.json
  python -m mla.bench --backend cpu --scenario decode --implementations mla,transformers
  python -m mla.bench --backend my_module:MyBackend --workload mine.toml --dry-run
  python -m mla.bench list

\b
Exit codes: 0 ok, 1 regression, 2 usage, 3 backend missing or unusable,
4 wrong result, 5 nothing ran, 130 interrupted (the partial result is written).
"""


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


class RunCommand(click.Command):
    """`run`, whose help also lists the other commands."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options and then the commands beside `run`."""
        super().format_options(ctx, formatter)
        others = [(name, one.get_short_help_str()) for name, one in cli.commands.items() if one is not self]
        with formatter.section("Commands"):
            formatter.write_dl([("run", "What is described here; the default."), *others])


@click.group(cls=DefaultGroup)
@click.version_option(package_name="mla")
def cli() -> None:
    """Measure MLA on an accelerator."""


@cli.command(cls=RunCommand, epilog=EPILOG, short_help="Measure the layer (the default).")
@click.option(
    "--backend",
    metavar="NAME",
    help="Backend to measure, or package.module:attribute. Default: the only usable one.",
)
@click.option("--device", metavar="INDEX", type=click.IntRange(min=0), help="Index of the device.")
@click.option("-O", "backend_options", metavar="KEY=VALUE", multiple=True, help="Option of the backend.")
@click.option("--threads", type=click.IntRange(1, 4096), help="Host threads. Default: the backend decides.")
@click.option(
    "--config",
    metavar="NAME|PATH",
    default="deepseek-v2-lite",
    show_default=True,
    help="Preset, or a config.json (or its folder).",
)
@click.option(
    "--model-path",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Checkpoint folder: config.json and safetensors of one layer or more, instead of --config.",
)
@click.option(
    "--layer",
    metavar="N",
    help="Layer of the checkpoint: 3, or 3.1 for the second of two attentions. Default: the only one.",
)
@click.option(
    "--workload",
    metavar="NAME|FILE",
    default=STANDARD,
    show_default=True,
    help="Scenarios to run: a TOML file of [[scenario]] tables with name, mode, query_lens, "
    "history, runs, passes, warmups, heads.",
)
@click.option(
    "--scenario",
    "scenarios",
    metavar="NAME",
    multiple=True,
    help="Run only this scenario of the workload; may be repeated.",
)
@click.option(
    "--implementations",
    metavar="A,B",
    default="",
    help="What to time, in turns: mla, mla-reference, transformers, transformers-eager. Default: "
    "mla, and mla-reference where a fused op makes it differ.",
)
@click.option(
    "--runs",
    type=click.IntRange(1, MAX_COUNT),
    help="Prefill: timed forwards, rounded up to equal passes. Decode: steps of a pass.  [workload: 100]",
)
@click.option(
    "--passes",
    type=click.IntRange(1, MAX_COUNT),
    help="Turns per implementation; a 95% interval needs 6.  [workload: 10 and 6]",
)
@click.option("--warmups", type=click.IntRange(0, MAX_COUNT), help="Untimed forwards first.  [workload: 10]")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Of weights, cache and activations.",
)
@click.option(
    "--attention",
    type=click.Choice(["auto", "absorbed", "expanded"]),
    default="auto",
    show_default=True,
    help="Path of attention; auto takes the one with fewer FLOPs per request.",
)
@click.option("--page-size", type=int, default=64, show_default=True, help="Tokens per cache page.")
@click.option(
    "--ops",
    type=click.Choice(["auto", "reference"]),
    default="auto",
    show_default=True,
    help="Use the backend's fused ops where they fit, or the reference only.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=2**32 - 1),
    default=0,
    show_default=True,
    help="Of weights, inputs, page order and turns.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write the complete result as JSON.",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(FORMATS),
    default="table",
    show_default=True,
    help="Of what is printed on stdout.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and the memory needed, and stop.")
@click.option("--list-ops", is_flag=True, help="Print which op runs where, and why, and stop.")
def run(**values: Any) -> int:
    """Measure one MLA layer on one device.

    By default the two standard scenarios run with the deepseek-v2-lite config: a prefill of 4 requests with
    704 new tokens, and 100 decode steps of 16 requests. Outputs are checked against a float64 oracle before
    and after timing. stdout carries the result, stderr everything else.
    """
    return commands.run(RunOptions(**values))


@cli.command("list", short_help="Show backends and their state, or the presets.")
@click.option("--configs", is_flag=True, help="Show the presets of --config and where they were read.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def list_backends(configs: bool, as_json: bool) -> int:
    """Show every installed and known backend and whether it is usable. Each is probed in its own process."""
    return commands.list_configs(as_json) if configs else commands.list_backends(as_json)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    return guarded(lambda: cli.main(words, prog_name="python -m mla.bench", standalone_mode=False))
