#!/usr/bin/env python3
"""Compare ops of the CPU plugin alone with those of ik_llama.cpp, or of llama.cpp.

\b
    python benchmarks/peers/ggml/build.py ~/ik_llama.cpp --into ~/ggml-native
    python benchmarks/peers/ggml/compare.py --peer ~/ggml-native -o ops.json
    python benchmarks/peers/ggml/compare.py --peer ~/ggml-native --only attention
    python benchmarks/peers/ggml/compare.py --markdown ops.json

Decode attention over latents, the selection of DeepSeek-V3.2's indexer, and the products of the default
config's projections; beside them the plain PyTorch reference and torch's own products. All ways take
turns, and all results are compared with float64. Exit codes as in `python -m mla.bench`; 4: one is wrong.
"""

from __future__ import annotations

import fnmatch
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3]))

import click
import torch

from benchmarks.attention_test import defaults
from benchmarks.peers.ggml import record, table
from benchmarks.peers.ggml.build import facts_of
from benchmarks.peers.ggml.peer import Peer
from benchmarks.peers.ggml.problems import Problem, Shape, shapes
from benchmarks.peers.ggml.ways import compared, require_passive_waiting
from mla.bench import results
from mla.bench.plan.request import Request, empty_run
from mla.bench.plan.resolve import resolve
from mla.bench.subjects.setting import Setting
from mla.command import console
from mla.command.exit_codes import Exit, guarded
from mla.errors import UsageError

# What decides which instructions torch and its libraries use, or how threads wait.
VARIABLES = (
    "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MLA_CPU_NATIVE",
    "OMP_WAIT_POLICY", "GOMP_SPINCOUNT",
)  # fmt: skip


def choose(setting: Setting, patterns: Sequence[str] | None) -> list[Shape]:
    """Return the shapes whose name or op matches a pattern; None: all. Raises `UsageError` if none does."""
    every = shapes(setting)
    chosen = [
        shape
        for shape in every
        if any(fnmatch.fnmatchcase(name, each) for name in (shape.name, shape.op) for each in patterns or "*")
    ]
    if not chosen:
        known = ", ".join(shape.name for shape in every)
        raise UsageError(
            f"--only matches no case: use attention, selection, product, {known}, or a pattern like 16x*."
        )
    return chosen


def measure(
    request: Request, folder: Path, patterns: tuple[str, ...] | None, rounds: int
) -> record.Comparison:
    """Measure the chosen shapes, one after the other. Raises `PeerError` or `UsageError`."""
    setting, threads = request.setting, torch.get_num_threads()
    chosen = choose(setting, patterns)
    with Peer(folder, threads) as peer, torch.inference_mode():
        cases = [compared(Problem(shape, setting), peer, rounds, setting.seed) for shape in chosen]
        run = empty_run(request)
        return record.Comparison(
            argv=["python benchmarks/peers/ggml/compare.py", *sys.argv[1:]],
            created=run.created,
            git_commit=run.git_commit,
            backend=run.backend,
            environment=run.environment | {key: os.environ[key] for key in VARIABLES if key in os.environ},
            peer={**facts_of(folder), **peer.facts},
            threads=threads,
            seed=setting.seed,
            cases=cases,
        )


def split(context: click.Context, option: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Return the words of a comma-separated option."""
    return None if value is None else tuple(word.strip() for word in value.split(",") if word.strip())


@click.command(help=__doc__)
@click.option("--peer", "folder", type=click.Path(path_type=Path), help="Folder that build.py made.")
@click.option("--only", callback=split, help="Attention, selection, product, names, patterns.  [all]")
@click.option("--runs", type=click.IntRange(1), default=15, show_default=True, help="Visits of every way.")
@click.option("--threads", type=click.IntRange(1, 4096), help="Threads of everyone.  [the backend decides]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of operands and order.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the result as JSON.")
@click.option(
    "--markdown", type=click.Path(path_type=Path), help="Only print this result's tables for a page."
)
def compare(
    folder: Path | None, only: tuple[str, ...] | None, runs: int, threads: int | None, seed: int,
    output: Path | None, markdown: Path | None,
) -> int:  # fmt: skip
    """Carry out the command line."""
    if markdown:
        console.out(table.markdown(record.read(markdown)))
        return Exit.OK
    if folder is None:
        raise UsageError(
            "--peer FOLDER is missing: it is the folder that benchmarks/peers/ggml/build.py made."
        )
    require_passive_waiting()
    request = resolve(
        defaults(backend="cpu", implementations="mla", threads=threads, seed=seed, output=output)
    )
    comparison = measure(request, folder, only, runs)
    if output:
        results.write(comparison, output)
    console.out(table.markdown(comparison))
    wrong = any(timing.wrong for case in comparison.cases for timing in case.timings)
    return Exit.WRONG if wrong else Exit.OK


if __name__ == "__main__":
    sys.exit(guarded(lambda: compare(standalone_mode=False)))
