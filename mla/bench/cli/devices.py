"""Commands about backends and devices: `list`, `doctor`, `new-backend`, `replay`, `capacity`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from mla.bench.workload.scenario import MAX_LAYERS
from mla.bench.workload.scenario import memory as read_memory
from mla.command import environment
from mla.command.backend import BackendOptions, backend_options, key_values, open_backend
from mla.command.console import note, out
from mla.command.exit_codes import Exit
from mla.command.options import FILE, Word, parsed_by
from mla.command.table import aligned
from mla.config import MLAConfig
from mla.config.presets import DEFAULT_CONFIG
from mla.errors import UsageError
from mla.parallel.layout import Capacity, Layout, capacity, layouts
from mla.text import DTYPES, size
from mla_backends import BackendOptionError, probe
from mla_backends.known import GENERAL, GENERAL_USE

LAYOUT_COLUMNS = ("layout", "weights", "cache", "tokens", "copies", "repeated")
REPLAY_EPILOG = """\b
Examples:
  python -m mla.bench replay failed
  python -m mla.bench replay failed --runs 100
  python -m mla.bench replay failed --op reference

\b
Exit codes: 0 every call was right, 2 usage, 3 backend missing or unusable, 4 a call was wrong.
"""


@click.command("list", short_help="Backends and their state, presets, or workloads.")
@click.option("--configs", is_flag=True, help="Show the presets of --config and where they were read.")
@click.option("--workloads", is_flag=True, help="Show the shipped workloads and where they were published.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def list_backends(configs: bool, workloads: bool, as_json: bool) -> int:
    """Show every installed and known backend and whether it is usable. Each is probed in its own process."""
    if configs and workloads:
        raise UsageError("--configs and --workloads are two lists: ask for one of them.")
    shown = _workloads if workloads else _configs if configs else _backends
    out(shown(as_json))
    return Exit.OK


def _configs(as_json: bool) -> str:
    from mla.bench.terminal import catalog

    return json.dumps(catalog.configs(), indent=1) + "\n" if as_json else catalog.configs_table()


def _workloads(as_json: bool) -> str:
    from mla.bench.terminal import catalog

    return json.dumps(catalog.workloads(), indent=1) + "\n" if as_json else catalog.workloads_table()


def _backends(as_json: bool) -> str:
    backends = probe.statuses(chosen=[*probe.names(), GENERAL])
    if as_json:
        return json.dumps([asdict(one) for one in backends], indent=1) + "\n"
    widths = [max(len(text) for text in column) for column in zip(*map(_named, backends), strict=True)]
    return "".join(_line(one, *widths) for one in backends)


def _named(one: probe.Status) -> tuple[str, str]:
    return one.name, one.state


def _line(one: probe.Status, name: int, state: int) -> str:
    version = f"{one.distribution} {one.version}" if one.distribution else ""
    why = "; ".join(part for part in (one.reason, one.hint) if part)
    if one.name == GENERAL and not why:
        why = f"without a plugin, {GENERAL_USE} (here {one.evidence['device']})"
    said = ": ".join(part for part in (version, why) if part)
    return f"{one.name:{name}}  {one.state:{state}}  {said}".rstrip() + "\n"


@click.command(short_help="Why a backend is or is not usable.")
@click.argument("name", cls=Word, required=False, help="Backend, or package.module:attribute. Default: all.")
@click.option("-O", "backend_options", metavar="KEY=VALUE", multiple=True, help="Option of the backend NAME.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def doctor(name: str | None, backend_options: tuple[str, ...], as_json: bool) -> int:
    """Say why a backend is or is not usable, one fix per line.

    Imports torch, probes the backend, sets up its device and lists its ops for the default config, each in a
    process of its own, so that a library that aborts or hangs becomes a line of the report. If torch itself
    does not import, the faulty extension is named.

    `doctor torch -O device=NAME` does so for a device without a plugin.

    Exit code 0 if the backend, or without NAME any backend, is usable; 2 for an option that it does not
    take; 3 if it is not usable, or if there is no such backend.
    """
    from mla.bench.doctor import diagnosis

    if mixed := environment.mixed_installation():
        note(mixed)
    if backend_options and name is None:
        raise UsageError("-O is an option of one backend: name it, as in `doctor torch -O device=cpu`.")
    report = diagnosis.diagnose(name, key_values(backend_options))
    facts = {**asdict(report), "usable": report.usable}
    out(json.dumps(facts, indent=1) + "\n" if as_json else diagnosis.as_text(report))
    if any(one.state == BackendOptionError.state for one in report.backends):
        return Exit.USAGE
    return Exit.OK if report.usable else Exit.BACKEND


@click.command("new-backend", short_help="A plugin project for a new device.")
@click.argument(
    "name", cls=Word, help="Name of the backend and of its torch device: lower-case, like 'acme'."
)
@click.argument(
    "folder", cls=Word, metavar="DIR", type=FILE, help="Where to write it: a new folder, or an empty one."
)
def new_backend(name: str, folder: Path) -> int:
    """Write a complete project for a backend: the package with one example op, its tests, and a README.

    It is for a device that torch knows as torch.NAME once its vendor's package is imported. The project is
    written whole or not at all; the next commands to run are printed.

    Exit code 0 if it was written; 2 if NAME is not a valid name or taken, or if DIR is not empty.
    """
    from mla.bench.scaffold.new_backend import create, next_commands

    create(name, folder)
    out(next_commands(name, folder))
    return Exit.OK


@click.command(epilog=REPLAY_EPILOG, short_help="The call that --dump-failure kept, made again.")
@click.argument("folder", type=FILE, cls=Word, help="The folder that --dump-failure named.")
@backend_options("Backend to replay on. Default: the one that failed, with its options.")
@click.option("--op", "name", metavar="NAME", help="Another op of the backend, or reference.")
@click.option("--runs", type=click.IntRange(1, 1_000_000), default=1, show_default=True, help="Calls.")
def replay(
    folder: Path,
    backend: str | None,
    device: int | None,
    backend_options: tuple[str, ...],
    threads: int | None,
    name: str | None,
    runs: int,
) -> int:
    """Make one call again that was wrong: the same operands in the same layout, judged by the same truth."""
    from mla.failures import file
    from mla.failures.replay import replay as repeat

    kept = file.read(folder)
    kept.call()  # may say that there is none
    origin, facts = kept.document.origin, kept.document.call
    assert facts is not None
    if backend is None:
        backend, backend_options = origin.backend, (*origin.options, *backend_options)
    opened = open_backend(BackendOptions(backend, device, backend_options, threads))
    note(f"kept       {origin.where}: {kept.document.reason}")
    found = repeat(kept, opened.backend, name, runs)
    wrong = [reason for reason in found if reason]
    what = f"{facts.role} (op '{name or facts.op}') on {opened.backend.device}"
    if not wrong and not name:
        why = {
            True: "the op has changed since: this call was wrong by itself when it was kept",
            False: "it depends on the calls before it, as it did when it was kept",
            None: "it may depend on the calls before it, or come and go (--runs 1000)",
        }[kept.document.alone]
        note(f"the failure did not repeat: {why}")
    if not wrong:
        out(f"{what}: right{f' in {runs} of {runs} calls' if runs > 1 else ''}\n")
        return Exit.OK
    often = f"wrong in {len(wrong)} of {runs} calls" if runs > 1 else "wrong"
    out(f"{what}: {often}: {wrong[0]}\n")
    return Exit.WRONG


@click.command("capacity", short_help="Tokens that several devices hold, by parallel layout.")
@click.option(
    "--config", metavar="NAME|PATH", default=DEFAULT_CONFIG, show_default=True, help="As for a run."
)
@click.option(
    "--memory",
    metavar="SIZE",
    required=True,
    callback=parsed_by(read_memory),
    help="Memory of one device for the layers' attention, weights and cache, such as 80GiB: less what the "
    "rest of the model takes.",
)
@click.option(
    "--parallel",
    "layout",
    metavar="LAYOUT",
    default="tp=1",
    show_default=True,
    callback=parsed_by(Layout.parse),
    help="tp=8, dp=2,tp=4, tp=4,dcp=2, ...; other layouts of as many devices are shown below it.",
)
@click.option(
    "--layers", type=click.IntRange(1, MAX_LAYERS), default=1, show_default=True, help="Layers of the model."
)
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    default="bf16",
    show_default=True,
    help="Of weights and cache.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def capacity_command(config: str, memory: int, layout: Layout, layers: int, dtype: str, as_json: bool) -> int:
    """Say how many tokens the devices of a layout hold together, and how much of the cache is repeated.

    tp repeats the whole latent on every device; dcp spreads the tokens of a request, and dp the requests.
    Weights are counted once, tokens without the room that is lost at the end of pages. Nothing is run.

    Exit code 0; 2 for a config or layout that does not exist, or heads that the layout cannot split.
    """
    chosen = MLAConfig.named(config)
    itemsize = 4 if dtype == "fp32" else 2

    def held_by(one: Layout) -> Capacity:
        return capacity(chosen, one, memory, layers, itemsize)

    others = [held_by(one) for one in layouts(chosen, layout.world) if one != layout]
    rows = [held_by(layout), *sorted(others, key=lambda one: -one.tokens)]
    out(json.dumps([_layout_object(one) for one in rows], indent=1) + "\n" if as_json else _layouts(rows))
    return Exit.OK


def _layouts(rows: list[Capacity]) -> str:
    """Return one line per layout, the one that was asked for first."""
    lines = (
        (str(one.layout), size(one.weight_bytes), size(one.cache_bytes) if one.cache_bytes else "no room",
         f"{one.tokens:,}", str(one.copies), f"{one.repeated:.0%}")
        for one in rows
    )  # fmt: skip
    return aligned(LAYOUT_COLUMNS, lines, words=("layout",)) + (
        "\nweights and cache: of one device; tokens: of all together, each counted once; repeated: the share "
        "of all\ncached bytes that is a copy\n"
    )


def _layout_object(one: Capacity) -> dict[str, Any]:
    """Return a line as JSON."""
    return {
        "layout": str(one.layout),
        "devices": one.layout.world,
        "weight_bytes_per_device": one.weight_bytes,
        "cache_bytes_per_device": one.cache_bytes,
        "tokens": one.tokens,
        "copies": one.copies,
    }
