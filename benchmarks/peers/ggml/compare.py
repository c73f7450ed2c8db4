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

import contextlib
import fnmatch
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3]))

import click
import torch

from benchmarks.attention_test import defaults
from benchmarks.peers.ggml import attention, products, record, selection, table
from benchmarks.peers.ggml.attention import AttentionCase, AttentionData
from benchmarks.peers.ggml.build import facts_of
from benchmarks.peers.ggml.peer import Peer
from benchmarks.peers.ggml.products import ProductCase, ProductData
from benchmarks.peers.ggml.selection import SelectionCase, SelectionData
from benchmarks.peers.ggml.ways import Way, judged, require_passive_waiting, take_turns, try_out
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


def choose(
    setting: Setting, patterns: Sequence[str] | None
) -> tuple[list[AttentionCase], list[SelectionCase], list[ProductCase]]:
    """Return the cases whose name or op matches a pattern; None: all. Raises `UsageError` if none does."""
    heads, shapes = attention.attention_cases(), products.product_cases(setting)
    indexers = selection.selection_cases()

    def named(*words: str) -> bool:
        return patterns is None or any(
            fnmatch.fnmatchcase(word, pattern) for pattern in patterns for word in words
        )

    chosen = (
        [case for case in heads if named(case.name, "attention")],
        [case for case in indexers if named(case.name, "selection")],
        [case for case in shapes if named(case.name, "product")],
    )
    if not any(chosen):
        known = ", ".join(case.name for cases in (heads, indexers, shapes) for case in cases)
        raise UsageError(
            f"--only matches no case: use attention, selection, product, {known}, or a pattern like 16x*."
        )
    return chosen


def attend(case: AttentionCase, setting: Setting, peer: Peer, rounds: int) -> record.Case:
    """Return one case of attention. Its ways take turns with each other alone."""
    data = AttentionData(case, replace(setting, config=setting.config.with_heads(case.heads)))
    console.note(f"timing {case.name}")
    with contextlib.ExitStack() as work:
        ways = [*attention.own_ways(data), *attention.peer_ways(data, peer, work.callback)]
        take_turns(try_out(ways), rounds, setting.seed)
        return judged(case.name, "attention", data.flops, ways, data.truth(), [])


def select(case: SelectionCase, setting: Setting, peer: Peer, rounds: int) -> record.Case:
    """Return one case of an indexer. Its ways take turns with each other alone."""
    data = SelectionData(case, setting)
    console.note(f"timing {case.name}")
    with contextlib.ExitStack() as work:
        ways = [*selection.own_ways(data), *selection.peer_ways(data, peer, work.callback)]
        take_turns(try_out(ways), rounds, setting.seed)
        return judged(case.name, "selection", data.flops, ways, data.truth(), [])


def multiply(cases: Sequence[ProductCase], setting: Setting, peer: Peer, rounds: int) -> list[record.Case]:
    """Return all products. They take turns together, so that a share of the best is one of its time."""
    if cases:
        console.note(f"timing {len(cases)} products")
    drawn: list[tuple[ProductCase, list[Way], torch.Tensor, list[str]]] = []
    timed: list[Way] = []
    with contextlib.ExitStack() as work:
        for case in cases:
            data, notes = ProductData(case, setting), list[str]()
            ways = products.all_ways(data, peer, notes, work.callback)
            timed += try_out(ways)
            drawn.append((case, ways, data.truth(), notes))
        take_turns(timed, rounds, setting.seed)
        return [judged(case.name, "product", case.flops, *rest) for case, *rest in drawn]  # type: ignore[arg-type]


def measure(
    request: Request, folder: Path, patterns: tuple[str, ...] | None, rounds: int
) -> record.Comparison:
    """Measure the chosen cases. Raises `PeerError` or `UsageError`."""
    setting, threads = request.setting, torch.get_num_threads()
    heads, indexers, shapes = choose(setting, patterns)
    with Peer(folder, threads) as peer, torch.inference_mode():
        cases = [attend(case, setting, peer, rounds) for case in heads]
        cases += [select(case, setting, peer, rounds) for case in indexers]
        cases += multiply(shapes, setting, peer, rounds)
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
    console.out(table.render(comparison))
    wrong = any(timing.wrong for case in comparison.cases for timing in case.timings)
    return Exit.WRONG if wrong else Exit.OK


if __name__ == "__main__":
    sys.exit(guarded(lambda: compare(standalone_mode=False)))
