"""The command that measures a device without the layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mla.bench.run import ceilings as ceilings_command
from mla.bench.terminal.ceilings import FORMATS


@click.command(short_help="Measure what the device reaches at best.")
@click.option(
    "--backend",
    metavar="NAME",
    help="Backend to measure, or package.module:attribute. Default: the only usable one.",
)
@click.option("--device", metavar="INDEX", type=click.IntRange(min=0), help="Index of the device.")
@click.option("-O", "backend_options", metavar="KEY=VALUE", multiple=True, help="Option of the backend.")
@click.option("--threads", type=click.IntRange(1, 4096), help="Host threads. Default: the backend decides.")
@click.option(
    "--dtype",
    metavar="A,B",
    help="Of products: bf16, fp16, fp32. Default: bf16 and fp32, where the device computes them natively.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write the complete result as JSON; `show` prints it again.",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(FORMATS),
    default="table",
    show_default=True,
    help="Of what is printed on stdout.",
)
def ceilings(**values: Any) -> int:
    """Measure what a device reaches at best, in about ten seconds.

    Reading and copying of footprints from 256 KiB to beyond the last-level cache, square products, and those
    of the default config's projections with 16 and 704 tokens; each in the way that was fastest, beside the
    peaks that the backend declares.

    Exit code 0; 2 for a mistake; 3 if the backend cannot be used; 5 if nothing could be measured; 130 if
    interrupted.
    """
    return ceilings_command.run(ceilings_command.CeilingOptions(**values))
