"""Predict what bounds the attention kernels on cards that are not here, from their machine code.

\b
    python -m benchmarks.triton.model          # the tiles as they are, with the Triton that is installed
    python -m benchmarks.triton.model FOLDER   # with every version in FOLDER; writes model.md and model.json

A kernel's time is that of its loop over keys. Each step of that loop is compiled, its instructions are
counted, and each unit of a multiprocessor gets the cycles that it needs for them:

\b
    tensor   products, at the rate of the instruction that computes them
    shared   bytes through shared memory: operands, copies that arrive, what warps exchange
    issue    instructions of all warps, over what the schedulers start in a cycle
    memory   bytes of the keys that no program before has fetched, at the bandwidth of the data sheet

The unit with the most cycles bounds the step. Shares of the card's tensor peak and of its bandwidth are given
as a range: the lower end if issue overlaps with nothing, the upper end if all units overlap. `needed` is the
share of the products that the algorithm asks for; warps that compute the same scores lower it. Latencies,
barriers, bank conflicts, tensor memory and the clock under load are not in the model, so that a card may stay
below the range, but not exceed it.

All of these are predictions; no card was run. `benchmarks/gpu/table.py` sets a card's results beside them.
FOLDER/VERSION holds each version of Triton, as for `python -m benchmarks.triton.table`. Several minutes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from benchmarks.triton.cards import CARDS, DATA, Card, spoken
from benchmarks.triton.cases import Case, Work
from benchmarks.triton.compiling import compile_cases
from benchmarks.triton.faults import tile_of
from benchmarks.triton.fingerprint import fingerprint
from benchmarks.triton.problems import ATTENTION
from benchmarks.triton.shipped import CURRENT
from benchmarks.triton.table import PARTS, installed
from mla.command import console

TABLE = Path(__file__).with_name("model.md")
HEADER = """# What bounds a step over keys: predictions

Written by `python -m benchmarks.triton.model FOLDER`, whose `--help` explains the columns. Counted in
machine code and **not run**: no such card was there. Constants and their sources: `cards.py`. MI300X stands
for MetaX's tiles. Kernels and tiles: `{fingerprint}`.
"""
COLUMNS = """
| card | launch | tile | tensor | shared | issue | memory | bound by | tensor peak | bandwidth | needed |
|---|---|---|---|---|---|---|---|---|---|---|"""


class Prediction(NamedTuple):
    """Cycles of a step by unit, and what follows from them."""

    cycles: Mapping[str, float]
    bound: str
    tensor_share: tuple[float, float]  # of the peak: issue overlaps with nothing, everything overlaps
    bandwidth_share: tuple[float, float]
    needed: float  # products needed over products issued


def predict(card: Card, work: Work, step: Mapping[str, Any]) -> Prediction:
    """Predict a step on a card. `step` is what was counted: see `counting`."""
    cycles = {
        "tensor": sum(flops / card.flops[unit] for unit, flops in step["flops"].items()),
        "shared": step["shared"] / card.shared,
        "issue": step["instructions"] / card.issued,
        "memory": work.bytes / card.memory(),
    }
    bound = max(cycles, key=cycles.__getitem__)
    others = max(value for unit, value in cycles.items() if unit != "issue")
    times = others + cycles["issue"], cycles[bound]
    products = work.flops / card.peak
    return Prediction(
        {unit: round(value) for unit, value in cycles.items()},
        bound,
        (round(products / times[0], 3), round(products / times[1], 3)),
        (round(cycles["memory"] / times[0], 3), round(cycles["memory"] / times[1], 3)),
        round(work.flops / sum(step["flops"].values()), 3),
    )


def cases(version: str = "") -> dict[tuple[str, str], Case]:
    """Return by target and launch what is compiled with a version of Triton; "" is a new one."""
    known = {(tiles.cards, tiles.target) for tiles in CURRENT}
    old = (tiles for part in PARTS if part.triton == version for tiles in part.shipped)
    compiled = [tiles for tiles in old if (tiles.cards, tiles.target) in known] if version else CURRENT
    launched = {str(tiles.target): tiles.cases() for tiles in compiled}
    return {(target, name): named[name] for target, named in launched.items() for name in ATTENTION}


Compiled = Mapping[tuple[str, str], tuple[Case, Mapping[str, Any]]]  # by target and launch


def rows(version: str, compiled: Compiled) -> Iterator[dict[str, Any]]:
    """Yield a row per card and launch, as JSON holds it; `error` stands in for what does not compile."""
    for name, card in CARDS.items():
        for (target, launch), (case, resources) in compiled.items():
            if target != card.target:
                continue
            row: dict[str, Any] = {"triton": version, "card": name, "target": target, "launch": launch}
            row["tile"] = tile_of(case)
            if "error" in resources:
                yield {**row, "error": resources["error"]}
                continue
            counted = {"spilled": resources["spilled"], "step": resources["step"]}
            yield {**row, **counted, **predict(card, Work.of(case), resources["step"])._asdict()}


def compiled_rows(triton: Path | None, jobs: int, version: str = "") -> list[dict[str, Any]]:
    """Compile everything with one version of Triton, by default that which is installed; return its rows."""
    wanted = cases(version)
    answers = compile_cases(list(wanted.values()), triton, jobs)
    version = next((answer["triton"] for answer in answers if "triton" in answer), "")
    pairs = zip(wanted.items(), answers, strict=True)
    return list(rows(version, {where: (case, answer) for (where, case), answer in pairs}))


def lines(version: str, table: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the Markdown of one version: cycles per step, and shares."""
    yield f"\n## Triton {version}\n{COLUMNS}"
    for row in table:
        start = f"| {row['card']} | {row['launch']} | {row['tile']} |"
        if "error" in row:
            yield f"{start} does not compile | | | | | | | |"
            continue
        numbers = " | ".join(f"{row['cycles'][unit]}" for unit in ("tensor", "shared", "issue", "memory"))
        shares = " | ".join(spoken(row[share]) for share in ("tensor_share", "bandwidth_share"))
        yield f"{start} {numbers} | {row['bound']} | {shares} | {row['needed']:.2f} |"


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path, exists=True), required=False)
@click.option("--jobs", type=int, default=os.cpu_count() or 1, show_default=True, help="Compilers at a time.")
def main(folder: Path | None, jobs: int) -> None:
    """Carry out the command line."""
    if folder is None:
        table = compiled_rows(None, jobs)
        console.out("\n".join(lines(table[0]["triton"], table)))
        return
    try:
        versions = installed(folder)
    except FileNotFoundError as error:
        raise click.UsageError(str(error)) from error
    by_version = {version: compiled_rows(where, jobs, version) for version, where in versions.items()}
    text = [HEADER.format(fingerprint=fingerprint())]
    text += [line for version, table in by_version.items() for line in lines(version, table)]
    TABLE.write_text("\n".join(text) + "\n", encoding="utf-8")
    flat = [json.dumps(row) for table in by_version.values() for row in table]
    start = json.dumps({"kernels": fingerprint()})[:-1]
    DATA.write_text(f'{start}, "rows": [\n' + ",\n".join(flat) + "\n]}\n", encoding="utf-8")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.triton.model")
