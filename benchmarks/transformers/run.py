"""A model of `transformers` with one layer of real dimensions, against itself with our ops.

    python -m benchmarks.transformers.run --backend cpu -o benchmarks/transformers/results/NAME.json

One request, random weights. Sides run in turns: `transformers` with sdpa and eager in three dtypes, while
they are at most twice as slow as the fastest; and our ops, with the stock dynamic cache and with a paged one.
Phases: a decode step; 64 tokens appended to a history; prefill of a whole prompt.
`python -m benchmarks.transformers.summary` makes tables and pictures of the result.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from itertools import product
from pathlib import Path

import torch

import mla
from benchmarks.transformers.record import Record, write
from benchmarks.transformers.sides import CONFIGS, make_sides
from benchmarks.transformers.turns import measure
from benchmarks.transformers.work import PHASES, Work
from mla.bench.measure.cold_cache import CacheFlush
from mla.command import files
from mla.command.console import note
from mla.command.environment import git_commit
from mla.config import MLAConfig
from mla.errors import MLAError
from mla_backends import BackendError, host

HISTORIES = (64, 512, 2048, 4096, 16384, 65536)
PACKAGES = ("torch", "transformers")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and return 0; 1 where one sentence on stderr says why there is no number."""
    words = list(arguments if arguments is not None else sys.argv[1:])
    asked = _parse(words)
    try:
        _run(asked, words)
    except (MLAError, BackendError) as error:
        note(f"error: {error}")
        return 1
    return 0


def _run(asked: argparse.Namespace, words: Sequence[str]) -> None:
    """Measure, and write after every length."""
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    files.check_writable(asked.output)
    backend = mla.load_backend(asked.backend)
    device = backend.device or torch.device("cpu")
    flush = CacheFlush(backend)
    record = Record(
        device=backend.device_info().name,
        threads=torch.get_num_threads(),
        backend=asked.backend,
        versions={name: version(name) for name in PACKAGES},
        commit=git_commit(),
        memory_bytes=host.memory_total(),
        flush=flush.method(),
        date=date.today().isoformat(),
        arguments=[asked.output.name if word == str(asked.output) else word for word in words],
    )
    for name in asked.config or CONFIGS:
        config = MLAConfig.named(name)
        sides = list(make_sides(config, asked.backend, device, max(asked.history) + 1024))
        for phase, length in product(asked.phase or PHASES, sorted(asked.history)):
            if phase != "prefill" or length <= asked.longest_prefill:
                work = Work(name, config, backend, flush, phase, length)
                record.rows += measure(work, sides, asked.rounds, asked.seconds)
                write(record, asked.output)
    note(f"written to {asked.output}")


def _count(word: str) -> int:
    """Return a number of at least one."""
    if not word.isdecimal() or not int(word):
        raise argparse.ArgumentTypeError(f"'{word}' is no number of at least 1")
    return int(word)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="a JSON file")
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--config", action="append", choices=CONFIGS, help="may be repeated; default: all")
    parser.add_argument("--history", type=_count, nargs="+", default=list(HISTORIES), help="tokens")
    parser.add_argument("--phase", action="append", choices=PHASES, help="may be repeated; default: all")
    parser.add_argument(
        "--longest-prefill", type=int, default=16384, help="tokens of a whole prompt, at most"
    )
    parser.add_argument("--rounds", type=_count, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a side in a round, about")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
