"""What ranks with a thread each cost against one process with as many threads: the same cores, both ways.

    python -m benchmarks.ranks.scaling FOLDER --layout tp=2 --rounds 3 -- --backend cpu --config deepseek-r1

Both are run in turn, so that a machine that slows down slows both. Options after `--` are those of `python -m
mla.bench`. Results stay in FOLDER, and a table goes to stdout.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mla.bench import results
from mla.bench.results.stats import median
from mla.bench.terminal.digits import number
from mla.command.console import note, out
from mla.command.table import markdown
from mla.parallel.layout import Layout

_HEADER = ("layout", "scenario", "one process ms", "ranks ms", "ratio", "of rounds")


class Round(NamedTuple):
    """Median milliseconds by scenario, of one process and of the ranks."""

    process: dict[str, float]
    ranks: dict[str, float]


def measure(layout: Layout, folder: Path, words: Sequence[str], count: int) -> Round:
    """Run one round, the other way first in every second one. A run that ends badly says why by itself."""
    common = ["-m", "mla.bench", *words, "--implementations", "mla"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(layout.world)]
    process, ranks = (folder / f"{kind}-{layout}-{count}.json" for kind in ("process", "ranks"))
    starts = [
        ([*common, "--threads", str(layout.world), "-o", str(process)], layout.world),
        ([*launcher, *common, "--threads", "1", "--parallel", str(layout), "-o", str(ranks)], 1),
    ]
    for start, threads in starts[:: -1 if count % 2 else 1]:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run([sys.executable, *start], env=environment, stdout=sys.stderr, check=False)
    return Round(_medians(process), _medians(ranks))


def _medians(path: Path) -> dict[str, float]:
    if not path.exists():
        return {}
    return {case.scenario: case.latency_ms.median for case in results.read(path).cases if case.latency_ms}


def table(layout: Layout, rounds: Sequence[Round]) -> str:
    """Return a row for each scenario: medians over rounds in which both had a number, and their ratios."""
    rows = []
    for name in dict.fromkeys(name for one in rounds for name in one.process):
        both = [
            (one.process[name], one.ranks[name]) for one in rounds if name in one.process.keys() & one.ranks
        ]
        if not both:
            continue
        ratios = sorted(ranks / process for process, ranks in both)
        medians = (number(median(list(one))) for one in zip(*both, strict=True))
        each = f"{ratios[0]:.2f} .. {ratios[-1]:.2f} of {len(both)}"
        rows.append((str(layout), name, *medians, f"{median(ratios):.2f}", each))
    return markdown(_HEADER, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where results go")
    parser.add_argument("--layout", type=Layout.parse, default=Layout.parse("tp=2"))
    parser.add_argument("--rounds", type=int, default=3)
    every = list(sys.argv[1:] if arguments is None else arguments)
    own = every.index("--") if "--" in every else len(every)
    given, words = parser.parse_args(every[:own]), every[own + 1 :] or ["--backend", "cpu"]
    given.folder.mkdir(parents=True, exist_ok=True)
    rounds = []
    for count in range(given.rounds):
        rounds.append(measure(given.layout, given.folder, words, count))
        note(f"round {count + 1} of {given.rounds}: {rounds[-1]}")
    out(table(given.layout, rounds))
    return int(not all(one.process and one.ranks for one in rounds))


if __name__ == "__main__":
    sys.exit(main())
