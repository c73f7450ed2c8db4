"""Options of one op of the layer alone, and its shape."""

from __future__ import annotations

import click

from mla.bench.workload.op_scenario import DEFAULT_BATCH, DEFAULT_HISTORY, DEFAULT_QUERY
from mla.bench.workload.quantities import size
from mla.bench.workload.scenario import MAX_COUNT, MAX_REQUESTS
from mla.command.options import parsed_by

OP = (
    click.option(
        "--op",
        metavar="NAME",
        help="Time one op of the contract without the layer, on lengths below or of batch specs: its name, "
        "or its role (see --list-ops).",
    ),
    click.option(
        "--batch",
        type=click.IntRange(1, MAX_REQUESTS),
        metavar="N",
        help=f"--op: requests.  [default: {DEFAULT_BATCH}]",
    ),
    click.option(
        "--kv",
        callback=parsed_by(size),
        metavar="LEN",
        help=f"--op: tokens per request cached before the new ones (4k).  [default: {DEFAULT_HISTORY}]",
    ),
    click.option(
        "--q-len",
        type=click.IntRange(1, MAX_COUNT),
        metavar="N",
        help=f"--op: new tokens per request.  [default: {DEFAULT_QUERY}]",
    ),
    click.option(
        "--heads",
        type=click.IntRange(1, MAX_COUNT),
        metavar="N",
        help="--op, --batch-spec: heads, instead of the config's.",
    ),
)
