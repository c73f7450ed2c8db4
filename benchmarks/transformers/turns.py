"""Sides in turns: one phase at one length."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

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
MAX_FORWARDS = 20  # forwards of a side in a round


class Disagreement(MLAError):
    """Sides attend differently: their times say nothing."""


def measure(work: Work, sides: Sequence[Side], rounds: int, seconds: float) -> list[Row]:
    """Return a row for each side. Raises `Disagreement`."""
    rows = {side: work.row(side) for side in sides}
    trial = _try(work, rows)
    _leave_out(trial, rows)
    for turn in range(rounds):
        for side in list(trial)[:: -1 if turn % 2 else 1]:
            if not rows[side].left_out:
                count = max(1, min(MAX_FORWARDS, int(1e3 * seconds / trial[side])))
                _time(work, side, rows[side], count)
    for row in rows.values():
        note(_line(row))
    return list(rows.values())


def _try(work: Work, rows: dict[Side, Row]) -> dict[Side, float]:
    """Weigh and compare all sides that fit; return the ms of each one's better forward of two."""
    trial: dict[Side, float] = {}
    first: tuple[Side, torch.Tensor] | None = None
    for side, row in rows.items():
        row.left_out, row.load = work.refusal(side), os.getloadavg()[0]
        if row.left_out:
            continue
        with _room(row):
            attended = work.weigh(side, row)
            first = first or (side, attended)
            deviation = _compared(side, attended, first[1])
            if side is not first[0] and not first[0].backend:  # else ours alone fit, and agrees with itself
                row.deviation = deviation
            trial[side] = min(forward.model_ms for forward in work.forwards(side, 2))
    return trial


def _time(work: Work, side: Side, row: Row, count: int) -> None:
    """Note so many forwards as a round."""
    with _room(row):
        found = list(work.forwards(side, count))
        row.model_ms.append([one.model_ms for one in found])
        row.attention_ms.append([one.attention_ms for one in found])


@contextlib.contextmanager
def _room(row: Row) -> Iterator[None]:
    """Leave a side out for which a device has no memory."""
    try:
        yield
    except torch.OutOfMemoryError:
        row.left_out, row.model_ms, row.attention_ms = "the device has too little memory for it", [], []


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
    side = f"{row.side} {row.dtype}, {row.allocator} allocator"
    what = f"{row.config} {row.phase}, history {row.history}, {side}: "
    if row.left_out:
        return what + row.left_out
    times = [sample for one in row.model_ms for sample in one]
    spread = f"{number(median(times))} ms ({number(min(times))} .. {number(max(times))})"
    return f"{what}{spread}, {row.transient_bytes / 2**20:.0f} MiB transient"
