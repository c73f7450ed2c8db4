#!/usr/bin/env python3
"""Compile what the plugins ship, for GPUs that need not be there, and write table.md.

    python -m benchmarks.triton.table FOLDER [--jobs N]

FOLDER/VERSION holds each version of Triton (`pip install --no-deps --target FOLDER/3.1.0 triton==3.1.0`).
Nothing is written, and the exit code is 1, if something that is shipped has a fault. About half an hour on
one core, where no answers are kept.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.triton.cases import Case
from benchmarks.triton.compiling import compile_cases
from benchmarks.triton.faults import faults, programs, tile_of
from benchmarks.triton.fingerprint import fingerprint
from benchmarks.triton.shipped import CURRENT, PORTABLE, TRITON_3_6, TRITON_3_8, Shipped

TABLE = Path(__file__).with_name("table.md")
HEADER = """# What the kernels need of a GPU

Written by `python -m benchmarks.triton.table`; [README.md](README.md) says how. Compiled ahead of time and
not run: no such GPU was there. Kernels and tiles: `{fingerprint}`.
"""
COLUMNS = """
| launch | tile | registers | spilled | shared KiB | programs | instructions |
|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Part:
    """What one version of Triton compiles."""

    triton: str
    why: str  # this version
    shipped: tuple[Shipped, ...]


PARTS = (
    Part("3.9.0", "which torch 2.15 pins", CURRENT),
    Part("3.8.0", "which torch 2.14 pins", TRITON_3_8),
    Part("3.6.0", "which torch 2.11 pins", TRITON_3_6),
    Part("3.1.0", "whose language the vendors' compilers speak", PORTABLE),
)


@dataclass(frozen=True)
class Row:
    shipped: Shipped
    name: str
    case: Case
    resources: dict[str, Any]

    @property
    def faults(self) -> list[str]:
        return faults(self.case, self.resources, self.shipped.shared)

    @property
    def cells(self) -> str:
        """Every column but the first, the launch."""
        start = f"{tile_of(self.case)} |"
        if "error" in self.resources:
            return f"{start} {self.faults[0]} | | | | |"
        fit = programs(self.case.target, self.case.warps, self.resources)
        counts = ", ".join(f"{n} {name}" for name, n in self.resources["instructions"].items())
        counted = (
            str(self.resources["registers"]),
            str(self.resources["spilled"]),
            f"{self.resources['shared'] / 1024:.1f}",
            "" if fit is None else str(fit),
            counts,
        )
        return f"{start} {' | '.join(counted)} |"


def compiled(part: Part, folder: Path, jobs: int) -> list[Row]:
    """Compile a part with the Triton in a folder; rows come in the order of what is shipped."""
    wanted = [(tiles, name, case) for tiles in part.shipped for name, case in tiles.cases().items()]
    answers = compile_cases([case for _, _, case in wanted], folder, jobs)
    return [Row(*what, resources) for what, resources in zip(wanted, answers, strict=True)]


def lines(part: Part, rows: Sequence[Row]) -> Iterator[str]:
    """Yield a part of the table as Markdown."""
    yield f"\n## Triton {part.triton}, {part.why}"
    for shipped in part.shipped:
        launches: dict[str, list[str]] = {}  # by what they need: equal ones are one row
        for row in rows:
            if row.shipped is shipped:
                launches.setdefault(row.cells, []).append(row.name)
        yield f"\n{shipped.cards}, compiled for {shipped.target}; a block may use {shipped.shared} KiB:"
        yield COLUMNS
        yield from (f"| {'; '.join(names)} | {cells}" for cells, names in launches.items())


def installed(folder: Path) -> dict[str, Path]:
    """Return the folder of each version of Triton. Raises FileNotFoundError if one is not there."""
    folders = {part.triton: folder / part.triton for part in PARTS}
    for version, where in folders.items():
        if not (where / f"triton-{version}.dist-info").is_dir():
            cure = f"pip install --no-deps --target {where} triton=={version}"
            raise FileNotFoundError(f"{where} has no Triton {version}: run `{cure}`.")
    return folders


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.triton.table")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the versions of Triton are")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    options = parser.parse_args()
    try:
        versions = installed(options.folder)
    except FileNotFoundError as error:
        parser.error(str(error))
    text, wrong = [HEADER.format(fingerprint=fingerprint())], []
    for part in PARTS:
        rows = compiled(part, versions[part.triton], options.jobs)
        text.extend(lines(part, rows))
        wrong += [(part.triton, row, why) for row in rows for why in row.faults]
    for triton, row, why in wrong:
        what = f"{row.shipped.cards}, {row.name} ({tile_of(row.case)})"
        print(f"Triton {triton}, {row.case.target}, {what}: {why}", file=sys.stderr)  # noqa: T201
    if not wrong:
        TABLE.write_text("\n".join(text) + "\n", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
