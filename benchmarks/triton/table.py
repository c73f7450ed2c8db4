#!/usr/bin/env python3
"""Compile what the plugins ship, for GPUs that need not be there, and write table.md.

    python -m benchmarks.triton.table --old FOLDER [--jobs N]

FOLDER holds Triton 3.1.0 (`pip install --no-deps --target FOLDER triton==3.1.0`). Nothing is written, and the
exit code is 1, if something that is shipped has a fault. About six minutes on one core.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.triton.cases import Case
from benchmarks.triton.compiling import compile_cases
from benchmarks.triton.faults import faults, programs, tile_of
from benchmarks.triton.fingerprint import fingerprint
from benchmarks.triton.shipped import CURRENT, OLD, PORTABLE, Shipped

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
    """Everything that one version of Triton compiles."""

    triton: str
    folder: Path | None
    shipped: tuple[Shipped, ...]
    strict: bool  # a fault is an error


@dataclass(frozen=True)
class Row:
    shipped: Shipped
    name: str
    case: Case
    found: dict[str, Any]

    @property
    def faults(self) -> list[str]:
        return faults(self.case, self.found, self.shipped.shared)

    def __str__(self) -> str:
        start = f"| {self.name} | {tile_of(self.case)} |"
        if "error" in self.found:
            return f"{start} {self.faults[0]} | | | | |"
        fit = programs(self.case.target, self.case.warps, self.found)
        counts = ", ".join(f"{n} {name}" for name, n in self.found["instructions"].items())
        cells = (
            str(self.found["registers"]),
            str(self.found["spilled"]),
            f"{self.found['shared'] / 1024:.1f}",
            "" if fit is None else str(fit),
            counts,
        )
        return f"{start} {' | '.join(cells)} |"


def compiled(part: Part, jobs: int) -> list[Row]:
    """Compile a part; rows come in the order of what is shipped."""
    wanted = [(one, name, case) for one in part.shipped for name, case in one.cases().items()]
    answers = compile_cases([case for _, _, case in wanted], part.folder, jobs)
    return [Row(*what, found) for what, found in zip(wanted, answers, strict=True)]


def lines(part: Part, rows: Sequence[Row]) -> Iterator[str]:
    """Yield a part of the table as Markdown."""
    yield f"\n## Triton {part.triton}{'' if part.strict else ', cards that have a newer one'}"
    for shipped in part.shipped:
        of_it = [row for row in rows if row.shipped is shipped]
        yield f"\n{shipped.cards}, compiled for {shipped.target}; a block may use {shipped.shared} KiB:"
        yield COLUMNS
        yield from map(str, of_it)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.triton.table")
    parser.add_argument("--old", type=Path, required=True, metavar="FOLDER", help="where Triton 3.1.0 is")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    options = parser.parse_args()
    parts = (
        Part(version("triton"), None, CURRENT, strict=True),
        Part("3.1.0", options.old, PORTABLE, strict=True),
        Part("3.1.0", options.old, OLD, strict=False),
    )
    text, wrong = [HEADER.format(fingerprint=fingerprint())], []
    for part in parts:
        rows = compiled(part, options.jobs)
        text.extend(lines(part, rows))
        wrong += [(part.triton, row, why) for row in rows if part.strict for why in row.faults]
    for triton, row, why in wrong:
        what = f"{row.shipped.cards}, {row.name} ({tile_of(row.case)})"
        print(f"Triton {triton}, {row.case.target}, {what}: {why}", file=sys.stderr)  # noqa: T201
    if not wrong:
        TABLE.write_text("\n".join(text) + "\n", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
