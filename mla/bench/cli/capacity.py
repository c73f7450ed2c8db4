"""`capacity`: how many tokens the memory of several devices holds, by layout."""

from __future__ import annotations

import json
from typing import Any

import click

from mla.bench.workload.quantities import memory as read_memory
from mla.bench.workload.scenario import MAX_LAYERS
from mla.command.console import out
from mla.command.exit_codes import Exit
from mla.command.options import parsed_by
from mla.command.table import aligned
from mla.config import MLAConfig
from mla.config.presets import DEFAULT_CONFIG
from mla.parallel.layout import Layout
from mla.parallel.work import Capacity, capacity, layouts
from mla.text import DTYPES, size

_HEADER = ("layout", "weights", "cache", "tokens", "copies", "repeated")


@click.command("capacity", short_help="Say how many tokens several devices hold, by layout.")
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
    out(json.dumps([_object(one) for one in rows], indent=1) + "\n" if as_json else _table(rows))
    return Exit.OK


def _table(rows: list[Capacity]) -> str:
    """Return one line per layout, the one that was asked for first."""
    lines = (
        (str(one.layout), size(one.weight_bytes), size(one.cache_bytes) if one.cache_bytes else "no room",
         f"{one.tokens:,}", str(one.copies), f"{one.repeated:.0%}")
        for one in rows
    )  # fmt: skip
    return aligned(_HEADER, lines, words=("layout",)) + (
        "\nweights and cache: of one device; tokens: of all together, each counted once; repeated: the share "
        "of all\ncached bytes that is a copy\n"
    )


def _object(one: Capacity) -> dict[str, Any]:
    """Return a line as JSON."""
    return {
        "layout": str(one.layout),
        "devices": one.layout.world,
        "weight_bytes_per_device": one.weight_bytes,
        "cache_bytes_per_device": one.cache_bytes,
        "tokens": one.tokens,
        "copies": one.copies,
    }
