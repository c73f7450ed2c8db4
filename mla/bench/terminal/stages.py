"""Print the stages of each case. Reads results only, so it needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

from mla.bench.results.schema import Case, Roofline, Stage
from mla.bench.terminal.digits import limit, number, per_second
from mla.command.table import table

_HEADER = ("ms", "share %", "FLOP/s", "GB/s", "% of limit")


def render(cases: Sequence[Case], kind: str) -> str:
    """Return the stages of every case that has some; "" if none has. `kind` is "table" or "md"."""
    return "".join(_case(case, kind) for case in cases if case.stages)


def total(stages: Sequence[Stage]) -> float:
    """Return the sum of all stages in milliseconds; parts of a stage ("stage: part") are counted in it."""
    return sum(stage.ms for stage in wholes(stages))


def _case(case: Case, kind: str) -> str:
    sum_ms, title = total(case.stages), f"stages of {case.scenario}, {case.implementation}"
    rows = [_row(stage, sum_ms, kind) for stage in case.stages]
    return f"{table(kind, (title, *_HEADER), rows, (title,))}\n{_note(case, sum_ms)}\n\n"


def _row(stage: Stage, sum_ms: float, kind: str) -> tuple[str, ...]:
    indented = kind == "table" and is_part(stage)
    cost = stage.cost
    return (
        f"  {stage.name.partition(': ')[2]}" if indented else stage.name,
        number(stage.ms),
        f"{100 * stage.ms / sum_ms:.1f}" if sum_ms else "-",
        per_second(_rate(cost.flops if cost else 0, stage.ms), ""),
        number(_rate(cost.bytes if cost else 0, stage.ms, 1e9)),
        limit(stage.roofline or Roofline()),
    )


def _rate(amount: int, ms: float, unit: float = 1.0) -> float | None:
    return amount / ms * 1e3 / unit if amount and ms else None


def _note(case: Case, sum_ms: float) -> str:
    forward = number(case.latency_ms.median if case.latency_ms else None)
    note = (
        f"Each is timed alone, with a synchronization before and after: the sum is {number(sum_ms)} ms, a "
        f"forward takes {forward} ms."
    )
    return note + " Bookkeeping is not part of a prefill's latency." * (case.mode == "prefill")


def wholes(stages: Sequence[Stage]) -> list[Stage]:
    """Return the stages that add up to the total, without their parts."""
    return [stage for stage in stages if not is_part(stage)]


def is_part(stage: Stage) -> bool:
    """Return whether a stage is part of the one named before the colon."""
    return ": " in stage.name
