"""How far `--simulate` is from real ranks: the same layouts with gloo on this machine, and predicted.

    python -m benchmarks.ranks.prediction FOLDER

Each layout runs on real ranks first, which measures their link, and is then simulated on that link. A table
goes to stdout, results stay in FOLDER. By default that is a layer like DeepSeek-R1's with a quarter of its
heads, on 2 and on 4 ranks; options after `--` are those of `python -m mla.bench` instead.

Real ranks of one host share its memory and caches, and a simulated one has them alone. Where there are more
ranks than CPUs they also take turns, which "in turns" accounts for: a share then takes as many times as long
as there are ranks for each CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mla.bench import results
from mla.bench.results.stats import median
from mla.bench.terminal.digits import between, known, number
from mla.command.table import markdown
from mla.parallel.layout import Layout

LAYOUTS = ("tp=2", "dcp=2", "tp=2,dcp=2")
# A layer with DeepSeek-R1's heads and latents, but fewer of them, that six runs can measure in a few minutes.
CONFIG = {
    "model_type": "deepseek_v3",
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "q_lora_rank": 512,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
OPTIONS = ("--backend", "cpu", "--implementations", "mla", "--runs", "6", "--passes", "6")
_HEADER = ("layout", "ranks on CPUs", "scenario", "implementation", "real ms", "95% CI")
_PREDICTED = ("predicted ms", "error", "in turns ms", "error", "collectives real ms", "predicted ms")


class Pair(NamedTuple):
    """One case on real ranks, and predicted."""

    layout: str
    cpus: int  # of the host
    real: results.Case
    predicted: results.Case

    def row(self) -> tuple[str, ...]:
        """Return the pair as cells. What collectives take on real ranks holds the wait for the slowest."""
        real, predicted = self.real.latency_ms, self.predicted.latency_ms
        ranks = f"{Layout.parse(self.layout).world} on {self.cpus}"
        names = (self.layout, ranks, self.real.scenario, self.real.implementation)
        if real is None or predicted is None:
            checks = f"real: {self.real.check.status}, predicted: {self.predicted.check.status}"
            return (*names, checks, *["-"] * (1 + len(_PREDICTED)))
        return (
            *names,
            *(known(real.median, real.ci95), between(real.ci95, real.median, real.ci95)),
            *_against(predicted.median, real.median),
            *_against(self._in_turns(predicted.median), real.median),
            *(number(_collectives(case)) for case in (self.real, self.predicted)),
        )

    def _in_turns(self, predicted_ms: float) -> float | None:
        """Return the prediction where ranks take turns on the CPUs; None where each has its own."""
        spread = self.predicted.spread
        turns = Layout.parse(self.layout).world / self.cpus
        if spread is None or spread.compute_ms is None or turns <= 1:
            return None
        return predicted_ms + (turns - 1) * spread.compute_ms

    def remark(self) -> str:
        """Return which ops the simulation did not run as real ranks did; "" if it ran all."""
        others = [role for role, op in self.real.ops.items() if self.predicted.ops.get(role) != op]
        where = f"{self.layout}, {self.real.scenario}, {self.real.implementation}"
        return f"{where}: other ops were simulated for {', '.join(others)}\n" if others else ""


def _against(predicted: float | None, real: float) -> tuple[str, str]:
    return number(predicted), "-" if predicted is None else f"{100 * (predicted / real - 1):+.0f} %"


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
    run = results.read(real)
    for case in run.cases:
        cpus = int(run.environment.get("cpus", layout.world))
        yield Pair(str(layout), cpus, case, found[case.scenario, case.implementation])


def _default_words(folder: Path) -> list[str]:
    config = folder / "like-r1.json"
    config.write_text(json.dumps(CONFIG))
    return [*OPTIONS, "--config", str(config)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all layouts, print the table of those that ended well, and return the first failure's exit code."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [-h] [--layout LAYOUT] FOLDER [-- OPTION ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="where results go")
    parser.add_argument("--layout", action="append", help=f"may be repeated; default: {' '.join(LAYOUTS)}")
    own = list(sys.argv[1:] if arguments is None else arguments)
    place = own.index("--") if "--" in own else len(own)  # argparse would want FOLDER right before it
    given, words = parser.parse_args(own[:place]), own[place + 1 :]
    given.folder.mkdir(parents=True, exist_ok=True)
    words = words or _default_words(given.folder)
    found: list[Pair] = []
    code = 0
    for layout in map(Layout.parse, given.layout or LAYOUTS):
        try:
            found += pairs(layout, *run(layout, given.folder, words))
        except subprocess.CalledProcessError as error:
            sys.stderr.write(f"{layout} ended with exit code {error.returncode}; see above.\n")
            code = code or error.returncode
    sys.stdout.write(markdown((*_HEADER, *_PREDICTED), [pair.row() for pair in found]))
    sys.stdout.write("".join(dict.fromkeys(f"\n{text}" for pair in found if (text := pair.remark()))))
    return code


if __name__ == "__main__":
    sys.exit(main())
