#!/usr/bin/env python3
"""How many times as fast ours is as each peer, from result files of `python -m mla.bench`.

\b
    python benchmarks/peers/table.py lite.json [MORE.json ...]

A Markdown table per file and scenario. `ours is` is the ratio of median times with its interval. `% of read`
is the time in which memory alone moves a forward's bytes (`MemoryRead`), as a share of the time. A sweep over
`cache_format` is one table: a row per shape, and each format's ms as a multiple of the first one's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))

import click

from mla.bench import results
from mla.bench.results.compare import compare_cases
from mla.bench.results.rows import by_scenario
from mla.bench.results.schema import Case, Run
from mla.bench.terminal.digits import between, known, number, percent
from mla.command import console
from mla.command.display import markdown
from mla.command.exit_codes import guarded

HEADER = ("implementation", "ms", "ours is", "% of read", "% of limit", "check")
BASELINES = ("read", "MemoryRead")


def short(case: Case) -> str:
    """Return an implementation's name without its package."""
    return case.implementation.rpartition(":")[2]


def is_baseline(case: Case) -> bool:
    """Return whether a case only reads memory."""
    return short(case) in BASELINES


def table(cases: Sequence[Case]) -> str:
    """Return the table of one scenario; its first case is ours."""
    read = next((case for case in cases if is_baseline(case)), None)
    return markdown(HEADER, [_row(case, cases[0], read) for case in cases])


def _row(case: Case, ours: Case, read: Case | None) -> list[str]:
    latency = case.latency_ms
    if latency is None:
        return [short(case), "-", "-", "-", "-", f"{case.check.status} {case.check.reason}".strip()]
    compared = compare_cases(ours, case)
    speed = "-"
    if case is not ours and not is_baseline(case) and compared.ratio is not None:
        bounds = between(compared.interval, compared.ratio, compared.interval)
        speed = f"{known(compared.ratio, compared.interval)}x" + (f" ({bounds})" if compared.interval else "")
    floor = read.latency_ms.median if read and read.latency_ms else None
    return [
        short(case), number(latency.median), speed, percent(floor and floor / latency.median),
        "-" if is_baseline(case) else percent(case.roofline.fraction),
        "baseline" if is_baseline(case) else case.check.status,
    ]  # fmt: skip


def formats(cases: Sequence[Case]) -> str:
    """Return the table of one op, or one implementation, over formats of the cache; the first is the base."""
    shapes: dict[tuple[object, ...], list[Case]] = {}
    for case in cases:
        shapes.setdefault((case.batch_spec or case.base, case.heads), []).append(case)
    names = list(dict.fromkeys(str(case.point["cache_format"]) for case in cases))
    head = ["requests", "heads", f"{names[0]}, ms", "% of limit", *names[1:]]
    return markdown(head, [[*map(str, shape), *_formats_row(row)] for shape, row in shapes.items()])


def _formats_row(cases: Sequence[Case]) -> list[str]:
    times = [case.latency_ms.median if case.latency_ms else None for case in cases]
    cells = [
        f"{number(ms)} ms, {ms / times[0]:.2f}x" if ms and times[0] else case.check.status
        for case, ms in zip(cases[1:], times[1:], strict=True)
    ]
    return [number(times[0]), percent(cases[0].roofline.fraction), *cells]


def header(run: Run) -> str:
    """Return what was measured, and where."""
    facts = run.environment
    kernels = facts.get("backend.kernels", "unknown")
    return (
        f"{run.config['name']}, {run.backend.device}, {facts['torch_threads']} threads, kernels {kernels}, "
        f"torch {facts['torch']}, {run.created[:10]}, commit {(run.git_commit or 'unknown')[:8]}"
    )


@click.command(help=__doc__)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
def main(files: tuple[Path, ...]) -> None:
    """Carry out the command line."""
    for run in map(results.read, files):
        console.out(f"{header(run)}\n")
        if all("cache_format" in case.point for case in run.cases):
            console.out(f"\n{formats(run.cases)}\n")
            continue
        for name, cases in by_scenario(run.cases).items():
            console.out(f"\n{name}\n\n{table(cases)}\n")


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(standalone_mode=False)))
