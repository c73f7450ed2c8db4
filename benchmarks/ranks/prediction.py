"""How far `--simulate` is from real ranks: `python -m benchmarks.ranks.prediction FOLDER [LAYOUT ...]`.

Each layout runs on real ranks first, which measures their link, and is then simulated on that link. A table
goes to stdout, results stay in FOLDER. Options after `--` are those of `python -m mla.bench`; by default the
layer is DeepSeek-R1's. Real ranks share a host's memory and caches, and take
turns where there are more of them than CPUs; a simulated one has all alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mla.bench import results
from mla.bench.terminal.digits import known, number
from mla.command.display import markdown
from mla.parallel.layout import Layout

LAYOUTS = ("tp=2", "dcp=2", "tp=2,dcp=2")
OPTIONS = (
    "--backend",
    "cpu",
    "--implementations",
    "mla",
    "--runs",
    "6",
    "--passes",
    "6",
    "--config",
    "deepseek-r1",
)


class Pair(NamedTuple):
    """One case on real ranks, and predicted."""

    layout: str
    cpus: int  # of the host
    real: results.Case
    predicted: results.Case

    def row(self) -> tuple[str, ...]:
        """Return the pair as cells."""
        real, predicted = self.real.latency_ms, self.predicted.latency_ms
        ranks = f"{Layout.parse(self.layout).world} on {self.cpus}"
        names = (self.layout, ranks, self.real.scenario, self.real.implementation)
        if real is None or predicted is None:
            return (*names, self.real.check.status, self.predicted.check.status, "-")
        error = f"{100 * (predicted.median / real.median - 1):+.0f} %"
        return (*names, known(real.median, real.ci95), number(predicted.median), error)


def run(layout: Layout, folder: Path, words: Sequence[str]) -> tuple[Path, Path]:
    """Run a layout on real ranks and simulate it; return both results. Raises `CalledProcessError`."""
    real, predicted = (folder / f"{kind}-{layout}.json" for kind in ("real", "predicted"))
    common = ["-m", "mla.bench", *words, "--parallel", str(layout), "--threads", "1"]
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(layout.world)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for start in (
        [*ranks, *common, "-o", str(real)],
        [*common, "--simulate", "--link", str(real), "-o", str(predicted)],
    ):
        subprocess.run([sys.executable, *start], env=environment, stdout=sys.stderr, check=True)
    return real, predicted


def pairs(layout: Layout, real: Path, predicted: Path) -> Iterator[Pair]:
    """Yield the cases that both results have."""
    simulated = {(case.scenario, case.implementation): case for case in results.read(predicted).cases}
    run = results.read(real)
    for case in run.cases:
        cpus = int(run.environment.get("cpus", layout.world))
        yield Pair(str(layout), cpus, case, simulated[case.scenario, case.implementation])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all layouts, print the table of those that ended well, and return the first failure's exit code."""
    every = list(sys.argv[1:] if arguments is None else arguments)
    place = every.index("--") if "--" in every else len(every)
    if not place:
        raise SystemExit(__doc__)
    folder, words = Path(every[0]), every[place + 1 :] or OPTIONS
    folder.mkdir(parents=True, exist_ok=True)
    measured: list[Pair] = []
    code = 0
    for layout in map(Layout.parse, every[1:place] or LAYOUTS):
        try:
            measured += pairs(layout, *run(layout, folder, words))
        except subprocess.CalledProcessError as error:
            sys.stderr.write(f"{layout} ended with exit code {error.returncode}; see above.\n")
            code = code or error.returncode
    header = ("layout", "ranks on CPUs", "scenario", "implementation", "real ms", "predicted ms", "error")
    sys.stdout.write(markdown(header, [pair.row() for pair in measured]))
    return code


if __name__ == "__main__":
    sys.exit(main())
