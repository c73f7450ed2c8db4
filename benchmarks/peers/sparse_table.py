#!/usr/bin/env python3
"""Write the page of sparse attention, and its picture, from what was measured.

\b
    python benchmarks/peers/sparse_table.py benchmarks/results/sparse

FOLDER holds `ops*.json` of `python -m mla.bench`, `layers*.json` of `sparse_layers.py` and `peers*.json` of
`ggml/compare.py`. `table.md` is written there, and `stage-light.svg` and `stage-dark.svg` of the best level.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args

sys.path.append(str(Path(__file__).parents[2]))

import click
import msgspec

from benchmarks.peers.ggml import record
from benchmarks.peers.ggml import table as peers
from benchmarks.peers.sparse_layers import Measured
from benchmarks.peers.table import header
from mla.bench import results
from mla.bench.report.figures import NARROW_INCHES, Chart, Line, Mode, Point, curves, svg
from mla.bench.report.page import write_pictures
from mla.bench.results.schema import Case, Run
from mla.bench.terminal.digits import estimated, known, limit, number, per_second
from mla.bench.terminal.tables import bounds
from mla.command.display import markdown
from mla.command.exit_codes import guarded
from mla.text import grouped

DENSE, STAGE = "latent_attention", ("select_latents", "sparse_latent_attention")
HEADER = ("requests", "history", "dense", "select", "attend to the selection", "select and attend is")
ABOUT = "Milliseconds of one decode step of DeepSeek-V3.2, and % of what memory or products allow."

Shapes = dict[tuple[int, int], dict[str, Case]]


def by_shape(runs: Iterable[Run]) -> Shapes:
    """Return the right cases of equal requests: (their number, keys of each) -> op -> case."""
    shapes: Shapes = {}
    for case in (case for run in runs for case in run.cases if case.check.status == "ok"):
        shape = len(case.history), case.history[0] + case.query_lens[0]
        shapes.setdefault(shape, {})[case.op or ""] = case
    return dict(sorted(shapes.items()))


def total(cases: dict[str, Case], *ops: str) -> float | None:
    """Return the ms of these ops together; None if one has no number."""
    times = [case.latency_ms.median for op in ops if (case := cases.get(op)) and case.latency_ms]
    return sum(times) if len(times) == len(ops) else None


def row(shape: tuple[int, int], cases: dict[str, Case]) -> list[str]:
    """Return one line of the table of ops."""
    timed = [(cases[op].latency_ms, cases[op].roofline) if op in cases else None for op in (DENSE, *STAGE)]
    cells = [f"{estimated(each[0])} ({limit(each[1])})" if each else "-" for each in timed]
    dense, sparse = total(cases, DENSE), total(cases, *STAGE)
    gain = f"{dense / sparse:.1f}x" if dense and sparse else "-"
    return [str(shape[0]), f"{shape[1] >> 10}k", *cells, gain]


def picture(shapes: Shapes) -> dict[str, str]:
    """Return the picture of dense attention and of both ops that take its place, in either mode."""
    lines: list[Line] = []
    limits: list[Line] = []
    batches = grouped(shapes.items(), lambda item: item[0][0])
    for marker, (batch, members) in zip("os^", batches.items(), strict=False):
        for name, colour, ops in (("dense", "s2", (DENSE,)), ("sparse", "s1", STAGE)):
            points = [Point(keys, ms) for (_, keys), cases in members if (ms := total(cases, *ops))]
            lines.append(Line(f"{name}, {batch} at once", colour, marker, "-", points))
        floors = [
            Point(keys, sum(cases[op].roofline.floor_ms or 0 for op in STAGE))
            for (_, keys), cases in members
            if total(cases, *STAGE)
        ]
        limits.append(Line(f"limit of sparse, {batch}", "s1", "", ":", floors))
    words = [
        f"{line.name}: {number(line.points[0].value)} to {number(line.points[-1].value)} ms"
        for line in lines
        if line.points
    ]
    draw = curves(lines, limits, ("keys of a request", "ms"))
    chart = Chart(
        "stage",
        "Attention of a decode step",
        "DeepSeek-V3.2; sparse: select and attend",
        "; ".join(words) + ".",
        draw,
    )
    return {f"stage-{mode}.svg": svg(chart, mode, NARROW_INCHES, titled=True) for mode in get_args(Mode)}


def of_layers(layers: Measured) -> str:
    """Return what `sparse_layers.py` measured, in a table and a sentence."""
    rows = [
        [name, known(ms, layers.ci95[name]), bounds(between, 2) if (between := layers.ci95[name]) else "-"]
        for name, ms in layers.ms.items()
    ]
    share = layers.gain / layers.allowed
    said = (
        f"{layers.requests} requests of {layers.history >> 10}k: the sparse layer is {layers.gain:.2f}x as "
        f"fast as the dense one. Projections (W) and products at {layers.tflops:.2f} TFLOP/s (F) allow "
        f"{layers.allowed:.2f}x: {share:.2f} of it."
    )
    if layers.over_transformers:
        said += f" It is {layers.over_transformers:.0f}x `transformers` with {layers.few} of 32k."
    return f"{markdown(('layer', 'ms', '95 %'), rows)}\n{said}\n"


def render(folder: Path) -> tuple[str, dict[str, str]]:
    """Return the page and the pictures. Raises `ResultError`."""
    levels = grouped(
        map(results.read, sorted(folder.glob("ops*.json"))), lambda run: run.environment["backend.kernels"]
    )
    parts = [f"# Sparse attention\n\n{ABOUT} Written by `benchmarks/peers/sparse_table.py`.\n"]
    drawn: dict[str, str] = {}
    for level, runs in levels.items():
        shapes = by_shape(runs)
        drawn = drawn or picture(shapes)
        rows = [row(*item) for item in shapes.items()]
        parts.append(f"## {level}\n\n{facts(runs)}\n\n{markdown(HEADER, rows)}")
    for path in sorted(folder.glob("layers*.json")):
        parts.append(f"## Layers\n\n{of_layers(msgspec.json.decode(path.read_bytes(), type=Measured))}")
    for path in sorted(folder.glob("peers*.json")):
        parts.append(f"## Indexers of others\n\n{peers.markdown(record.read(path))}")
    return "\n".join(parts), drawn


def facts(runs: Sequence[Run]) -> str:
    """Return what was measured, where, and the rate of products that was found there."""
    rates = [c.value for run in runs for c in run.ceilings if c.work == "matmul"]
    return (
        f"{header(runs[0])}. Products reach {per_second(max(rates), 'FLOP/s')}." if rates else header(runs[0])
    )


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
def main(folder: Path) -> None:
    """Carry out the command line."""
    page, drawn = render(folder)
    (folder / "table.md").write_text(page, encoding="utf-8")
    write_pictures(drawn, folder)


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(standalone_mode=False)))
