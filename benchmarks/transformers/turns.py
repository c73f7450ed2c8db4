"""Sides in turns: one phase at one length."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from benchmarks.transformers.record import Row
from benchmarks.transformers.sides import Side
from benchmarks.transformers.work import Work
from mla.bench.results.stats import median
from mla.bench.terminal.digits import number
from mla.command.console import note
from mla.errors import MLAError

TOO_SLOW = 2.0  # as the fastest of `transformers`, in the best of two forwards: left out at this length
AGREES = 0.03  # relative distance of the last token's attention
MOST = 20  # forwards of a side in a round


class Disagreement(MLAError):
    """Sides attend differently: their times say nothing."""


def measure(work: Work, sides: Sequence[Side], rounds: int, seconds: float) -> list[Row]:
    """Return a row for each side. Raises `Disagreement`."""
    rows = {side: work.row(side) for side in sides}
    trial: dict[Side, float] = {}
    first: torch.Tensor | None = None
    for side, row in rows.items():
        row.left_out, row.load = work.refusal(side), os.getloadavg()[0]
        if not row.left_out:
            attended = work.weigh(side, row)
            first = attended if first is None else first
            row.deviation = _compared(side, attended, first)
            trial[side] = min(one.model_ms for one in work.forwards(side, 2))
    _leave_out(trial, rows)
    taking = [side for side, row in rows.items() if not row.left_out]
    for turn in range(rounds):
        for side in taking[:: -1 if turn % 2 else 1]:
            count = max(1, min(MOST, int(1e3 * seconds / trial[side])))
            found = list(work.forwards(side, count))
            rows[side].model_ms.append([one.model_ms for one in found])
            rows[side].attention_ms.append([one.attention_ms for one in found])
    for row in rows.values():
        note(_line(row))
    return list(rows.values())


def _compared(side: Side, attended: torch.Tensor, first: torch.Tensor) -> float:
    """Return how far attention is from that of the first side. Raises `Disagreement`."""
    deviation = float((attended - first).norm() / first.norm())
    if not deviation < AGREES:
        raise Disagreement(f"{side.name} in {side.dtype}: attention differs by {deviation:.3g}, relatively")
    return deviation


def _leave_out(trial: dict[Side, float], rows: dict[Side, Row]) -> None:
    """Say which sides of `transformers` are no match for its fastest."""
    stock = {side: taken for side, taken in trial.items() if not side.backend}
    for side, taken in stock.items():
        ratio = taken / min(stock.values())
        if ratio > TOO_SLOW:
            rows[side].left_out = f"{ratio:.1f}x as slow as the fastest"


def _line(row: Row) -> str:
    """Return a line that shows progress."""
    what = f"{row.config} {row.phase}, history {row.history}, {row.side} {row.dtype}: "
    if row.left_out:
        return what + row.left_out
    times = [sample for one in row.model_ms for sample in one]
    spread = f"{number(median(times))} ms ({number(min(times))} .. {number(max(times))})"
    return f"{what}{spread}, {row.transient_bytes / 2**20:.0f} MiB transient"
