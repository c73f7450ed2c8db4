"""Print the stages of each case. Reads results only, so it needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mla.bench.results.schema import Case, Roofline, Stage
from mla.command.table import aligned, markdown

_HEADER = ("ms", "share %", "TFLOP/s", "GB/s", "% of limit")

Number = Callable[[float | None], str]


def render(cases: Sequence[Case], kind: str, number: Number, limit: Callable[[Roofline], str]) -> str:
    """Return the stages of every case that has some; "" if none has. `kind` is "table" or "md".

    `number` and `limit` format numbers and limits as in the table of cases.
    """
    return "".join(_case(case, kind, number, limit) for case in cases if case.stages)


def total(stages: Sequence[Stage]) -> float:
    """Return the sum of all stages in milliseconds; parts of a stage ("stage: part") are counted in it."""
    return sum(stage.ms for stage in stages if not is_part(stage))


def _case(case: Case, kind: str, number: Number, limit: Callable[[Roofline], str]) -> str:
    sum_ms, title = total(case.stages), f"stages of {case.scenario}, {case.implementation}"
    rows = [_row(stage, sum_ms, kind, number, limit) for stage in case.stages]
    if kind == "md":
        table = markdown((title, *_HEADER), rows)
    else:
        table = aligned((title, *_HEADER), rows, words=(title,))
    return f"{table}\n{_note(case, sum_ms, number)}\n\n"


def _row(
    stage: Stage, sum_ms: float, kind: str, number: Number, limit: Callable[[Roofline], str]
) -> tuple[str, ...]:
    indented = kind == "table" and is_part(stage)
    cost = stage.cost
    return (
        f"  {stage.name.partition(': ')[2]}" if indented else stage.name,
        number(stage.ms),
        f"{100 * stage.ms / sum_ms:.1f}" if sum_ms else "-",
        _rate(cost.flops if cost else 0, stage.ms, 1e12, number),
        _rate(cost.bytes if cost else 0, stage.ms, 1e9, number),
        limit(stage.roofline or Roofline()),
    )


def _rate(amount: int, ms: float, unit: float, number: Number) -> str:
    return number(amount / ms * 1e3 / unit if amount and ms else None)


def _note(case: Case, sum_ms: float, number: Number) -> str:
    forward = number(case.latency_ms.median if case.latency_ms else None)
    note = (
        "Each is timed alone between two synchronizations that a forward does not make: they add up to "
        f"{number(sum_ms)} ms, a forward takes {forward} ms."
    )
    return note + " Bookkeeping is not part of a prefill's latency." * (case.mode == "prefill")


def wholes(stages: Sequence[Stage]) -> list[Stage]:
    """Return the stages that add up to the total, without their parts."""
    return [stage for stage in stages if not is_part(stage)]


def is_part(stage: Stage) -> bool:
    """Return whether a stage is part of the one named before the colon."""
    return ": " in stage.name
