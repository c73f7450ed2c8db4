"""How far `--simulate` is from real ranks: the same layouts with gloo on this machine, and predicted.

    python -m benchmarks.ranks.prediction FOLDER -- --backend cpu --config deepseek-v2-lite --runs 20

Each layout runs on real ranks first, which measures their link, and is then simulated on that link. Options
after `--` are those of `python -m mla.bench`. Results stay in FOLDER, and a table goes to stdout.

Real ranks of one host share its memory and caches, and a simulated one has them alone: on a machine with as
many memory channels as ranks, or on devices of their own, the error is that of the model.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mla.bench import results
from mla.bench.results.stats import median
from mla.bench.terminal.digits import number
from mla.command.table import markdown
from mla.parallel.layout import Layout

LAYOUTS = ("tp=2", "dcp=2", "tp=2,dcp=2")
_HEADER = ("layout", "scenario", "implementation", "real ms", "95% CI", "predicted ms", "error")
_COLLECTIVES = ("collectives real ms", "predicted ms")


class Pair(NamedTuple):
    """One case on real ranks, and predicted."""

    layout: str
    real: results.Case
    predicted: results.Case

    def row(self) -> tuple[str, ...]:
        """Return the pair as cells. What collectives take on real ranks holds the wait for the slowest."""
        real, predicted = self.real.latency_ms, self.predicted.latency_ms
        if real is None or predicted is None:
            checks = f"real: {self.real.check.status}, predicted: {self.predicted.check.status}"
            return (self.layout, self.real.scenario, self.real.implementation, checks, *["-"] * 5)
        interval = "-" if real.ci95 is None else f"{number(real.ci95[0])} .. {number(real.ci95[1])}"
        return (
            *(self.layout, self.real.scenario, self.real.implementation),
            *(number(real.median), interval, number(predicted.median)),
            f"{predicted.median / real.median - 1:+.0%}",
            *(number(_collectives(case)) for case in (self.real, self.predicted)),
        )


def _collectives(case: results.Case) -> float | None:
    """Return the milliseconds of collectives on the median rank."""
    return None if case.spread is None else median([one.collective_ms for one in case.spread.ranks])


def run(layout: Layout, folder: Path, words: Sequence[str]) -> tuple[Path, Path]:
    """Run a layout on real ranks and simulate it; return both results."""
    real, predicted = (folder / f"{kind}-{layout}.json" for kind in ("real", "predicted"))
    common = ["-m", "mla.bench", *words, "--parallel", str(layout), "--threads", "1"]
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(layout.world)]
    _start([*ranks, *common, "-o", str(real)])
    _start([*common, "--simulate", "--link", str(real), "-o", str(predicted)])
    return real, predicted


def _start(words: Sequence[str]) -> None:
    """Run a command with one thread a rank, its table on stderr. Raises `CalledProcessError`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *words], env=environment, stdout=sys.stderr, check=True)


def pairs(layout: Layout, real: Path, predicted: Path) -> Iterator[Pair]:
    """Yield the cases that both results have."""
    found = {(case.scenario, case.implementation): case for case in results.read(predicted).cases}
    for case in results.read(real).cases:
        yield Pair(str(layout), case, found[case.scenario, case.implementation])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all layouts and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where results go")
    parser.add_argument("--layout", action="append", help=f"may be repeated; default: {' '.join(LAYOUTS)}")
    parser.add_argument("words", nargs="*", metavar="OPTION", help="options of mla.bench, after --")
    given = parser.parse_args(arguments)
    given.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for layout in map(Layout.parse, given.layout or LAYOUTS):
        try:
            files = run(layout, given.folder, given.words or ["--backend", "cpu"])
        except subprocess.CalledProcessError as error:
            sys.stderr.write(f"{layout} ended with exit code {error.returncode}; see above.\n")
            return error.returncode
        rows += [pair.row() for pair in pairs(layout, *files)]
    sys.stdout.write(markdown((*_HEADER, *_COLLECTIVES), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
