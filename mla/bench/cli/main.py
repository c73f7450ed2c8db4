"""The command line of `python -m mla.bench`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from mla.bench.cli import ceilings as cli_ceilings
from mla.bench.cli import compare as cli_files
from mla.bench.cli import report as cli_report
from mla.bench.cli.op_options import op_options
from mla.bench.cli.run_options import course_options
from mla.bench.plan import resolve
from mla.bench.plan.options import DEFAULT_DTYPE, DEFAULT_PAGE_SIZE, RunOptions
from mla.bench.terminal.run_table import FORMATS
from mla.bench.workload.scenario import MAX_COUNT, MAX_LAYERS, PRESETS, STANDARD
from mla.command.exit_codes import guarded
from mla.command.options import Word
from mla.config.presets import DEFAULT_CONFIG
from mla.errors import did_you_mean

EPILOG = """\b
Examples:
  python -m mla.bench --backend cpu
  python -m mla.bench --backend cpu --config deepseek-r1 --runs 10 -o run.json
  python -m mla.bench --backend cpu --scenario decode --implementations mla,transformers
  python -m mla.bench --backend cpu --scenario decode -a kv=1k..16k*4 -a batch=1,16 -o sweep.json
  python -m mla.bench --backend cpu --preset full --budget 10m -o full.json
  python -m mla.bench --backend cpu --op latent_attention --batch 64 --kv 4k
  python -m mla.bench --backend my_module:MyBackend --workload mine.toml --dry-run
  python -m mla.bench compare before.json after.json --fail-slower 3%
  python -m mla.bench report before.json after.json --html report.html
  python -m mla.bench ceilings --backend cpu
  python -m mla.bench list
  python -m mla.bench doctor cpu
  python -m mla.bench new-backend acme ./acme

\b
Exit codes: 0 ok, 1 regression, 2 usage, 3 backend missing, unusable or hung,
4 wrong result, 5 nothing ran, 130 interrupted, 143 ended by SIGTERM (the partial result is written).
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
@click.option(
    "--device",
    metavar="INDEX",
    type=click.IntRange(min=0),
    help="Index of the device. Default: by LOCAL_RANK (torchrun) or SLURM_LOCALID, else the current one.",
)
@click.option("-O", "backend_options", metavar="KEY=VALUE", multiple=True, help="Option of the backend.")
@click.option("--threads", type=click.IntRange(1, 4096), help="Host threads. Default: the backend decides.")
@click.option(
    "--config",
    metavar="NAME|PATH",
    show_default=DEFAULT_CONFIG,
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
    "--preset",
    type=click.Choice(PRESETS),
    help="A shipped workload instead of --workload: smoke takes seconds; full adds sweeps over history, "
    "batch and tokens per step.",
)
@click.option(
    "--workload",
    metavar="NAME|FILE",
    show_default=STANDARD,
    help="Scenarios to run: a TOML file of [[scenario]] tables with name, mode, query_lens, "
    "history, runs, passes, warmups, heads, layers, axes.",
)
@click.option(
    "--scenario",
    "scenarios",
    metavar="NAME",
    multiple=True,
    help="Run only this scenario of the workload; may be repeated.",
)
@op_options
@click.option(
    "-a",
    "--axis",
    "axes",
    metavar="AXIS=VALUES",
    multiple=True,
    help="Lay a grid over every scenario; may be repeated. Axes: batch, kv (history), q_len (new tokens of a "
    "request), heads, dtype, page_size. Values: 1,8,64 or 1k..64k*4 or 1..8+1; k is 1024.",
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
    help="Prefill: timed forwards, rounded up to equal passes. Decode: steps of a pass. "
    "--op: calls of a pass.  [workload: 100]",
)
@click.option(
    "--passes",
    type=click.IntRange(1, MAX_COUNT),
    help="Turns per implementation; a 95% interval needs 6.  [workload: 10 and 6]",
)
@click.option(
    "--layers",
    type=click.IntRange(1, MAX_LAYERS),
    help="Layers with weights and caches of their own, one after the other, as in a model; numbers are per "
    "layer.  [workload: 1]",
)
@click.option(
    "--warmups",
    type=click.IntRange(0, MAX_COUNT),
    help="Untimed forwards first, and more until latencies settle; 0: none.  [workload: 10]",
)
@click.option(
    "--mode",
    metavar="A,B",
    help="How forwards are launched: eager, graph (replayed). Default: both where the backend has graphs.",
)
@click.option(
    "--cache",
    metavar="A,B",
    help="Caches before a forward: warm, cold (swept). Default: both.",
)
@click.option(
    "--clock",
    metavar="A,B",
    help="host, device. Default: both where the device has a clock. Every combination of the three is timed; "
    "eager, warm, host is the headline and always is.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    show_default=DEFAULT_DTYPE,
    help="Of weights, cache and activations.",
)
@click.option(
    "--attention",
    type=click.Choice(["auto", "absorbed", "expanded"]),
    default="auto",
    show_default=True,
    help="Path of attention; auto takes the one with fewer FLOPs per request.",
)
@click.option("--page-size", type=int, show_default=str(DEFAULT_PAGE_SIZE), help="Tokens per cache page.")
@click.option(
    "--ops",
    metavar="POLICY",
    default="auto",
    show_default=True,
    help="auto: the backend's fused ops where they fit; reference: none; fused: an error where one is "
    "offered and does not fit; or names of ops to insist on, comma-separated (see --list-ops).",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=2**32 - 1),
    default=0,
    show_default=True,
    help="Of weights, inputs, page order and turns.",
)
@course_options
@click.option(
    "--format",
    "kind",
    type=click.Choice(FORMATS),
    default="table",
    show_default=True,
    help="Of what is printed on stdout.",
)
@click.option(
    "--stages",
    is_flag=True,
    help="Afterwards time every op of the layer alone, and print where a forward's time goes.",
)
@click.option(
    "--dry-run", is_flag=True, help="Print every case, its memory and about its time on stderr, and stop."
)
@click.option("--list-ops", is_flag=True, help="Print which op runs where, and why, and stop.")
def run(**values: Any) -> int:
    """Measure one MLA layer on one device.

    By default the two standard scenarios run with the deepseek-v2-lite config: a prefill of 4 requests with
    704 new tokens, and 100 decode steps of 16 requests. Outputs are checked against a float64 oracle before
    and after timing. stdout carries the result, stderr everything else.
    """
    return resolve.run(RunOptions(**values))


@cli.command("list", short_help="Show backends and their state, or the presets.")
@click.option("--configs", is_flag=True, help="Show the presets of --config and where they were read.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def list_backends(configs: bool, as_json: bool) -> int:
    """Show every installed and known backend and whether it is usable. Each is probed in its own process."""
    return resolve.list_configs(as_json) if configs else resolve.list_backends(as_json)


@cli.command(short_help="Say why a backend is or is not usable.")
@click.argument("name", cls=Word, required=False, help="Backend, or package.module:attribute. Default: all.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def doctor(name: str | None, as_json: bool) -> int:
    """Say why a backend is or is not usable, one fix per line.

    Imports torch, probes the backend, sets up its device and lists its ops for the default config, each in a
    process of its own, so that a library that aborts or hangs is a line of the report. Where torch itself
    does not import, the extension to blame is named.

    Exit code 0 if the backend, or without NAME any backend, is usable; 3 if not, or if nobody offers NAME.
    """
    return resolve.doctor(name, as_json)


@cli.command("new-backend", short_help="Write the project of a new backend.")
@click.argument("name", cls=Word, help="Of the backend, and of its torch device: lower-case, like 'acme'.")
@click.argument(
    "folder",
    cls=Word,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Where to write it: a new folder, or an empty one.",
)
def new_backend(name: str, folder: Path) -> int:
    """Write a complete project for a backend: the package with one example op, its tests, and a README.

    It is for a device that torch knows as torch.NAME once its vendor's package is imported. The project is
    written whole or not at all; the commands to go on with are printed.

    Exit code 0 if it was written; 2 if NAME is no name for a backend or taken, or if DIR is not empty.
    """
    return resolve.new_backend(name, folder)


for command in (cli_files.compare, cli_files.show, cli_report.report, cli_ceilings.ceilings):
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    return guarded(lambda: cli.main(words, prog_name="python -m mla.bench", standalone_mode=False))
