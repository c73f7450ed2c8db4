"""Print where a case's time goes, stage by stage. Reads results only, so it needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mla.bench.results.schema import Case, Roofline, Stage
from mla.command.table import aligned, markdown

_HEADER = ("ms", "share %", "TFLOP/s", "GB/s", "% of limit")

Number = Callable[[float | None], str]


def render(cases: Sequence[Case], kind: str, number: Number, limit: Callable[[Roofline], str]) -> str:
    """Return the stages of every case that has some; nothing for a run without. `kind`: "table" or "md".

    `number` and `limit` write what the table of cases writes with them.
    """
    return "".join(_case(case, kind, number, limit) for case in cases if case.stages)


def total(stages: Sequence[Stage]) -> float:
    """Return the milliseconds of all stages; rows about a part of one ("stage: part") are in its own."""
    return sum(stage.ms for stage in stages if not is_part(stage))


def _case(case: Case, kind: str, number: Number, limit: Callable[[Roofline], str]) -> str:
    sum_ms, title = total(case.stages), f"stages of {case.scenario}, {case.implementation}"
    rows = [_row(stage, sum_ms, kind, number, limit) for stage in case.stages]
    if kind == "md":
        table = markdown((title, *_HEADER), rows)
    else:
        table = aligned((title, *_HEADER), rows, words=(title,))
    return f"{table}\n{_remark(case, sum_ms, number)}\n\n"


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


def _remark(case: Case, sum_ms: float, number: Number) -> str:
    forward = number(case.latency_ms.median if case.latency_ms else None)
    remark = (
        "Each is timed alone between two synchronizations, which a forward does without: they add up to "
        f"{number(sum_ms)} ms, and a forward takes {forward} ms."
    )
    return remark + " Bookkeeping is no part of a prefill's latency." * (case.mode == "prefill")


def wholes(stages: Sequence[Stage]) -> list[Stage]:
    """Return the stages that add up to the sum, without the parts they are made of."""
    return [stage for stage in stages if not is_part(stage)]


def is_part(stage: Stage) -> bool:
    """Say whether a stage is part of the one named before the colon."""
    return ": " in stage.name
