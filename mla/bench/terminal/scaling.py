"""Print how much faster scenarios are on several ranks than on one device. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

from mla.bench.results.scaling import Scaled, Scaling
from mla.bench.terminal.digits import known, number
from mla.bench.terminal.ranks import percent
from mla.command.table import aligned, markdown

COLUMNS = ("latency ms", "speedup", "90% CI", "efficiency", "collectives ms", "repeated")
_TITLE = "strong scaling: speedup over the base, and efficiency, which is speedup over {units} used"


def render(found: Sequence[Scaling], kind: str) -> str:
    """Return a table for every scenario that is there on ranks and on one device; "" if none is."""
    if not found:
        return ""
    on_host = all(one.base.threads is not None for one in found)
    title = _TITLE.format(units="cores" if on_host else "devices")
    return "\n".join([f"{title}\n", *(_table(one, kind) for one in found)])


def cells(row: Scaled) -> tuple[str, ...]:
    """Return what `COLUMNS` say of a row."""
    latency = row.case.latency_ms
    assert latency is not None
    bounds = f"{row.interval[0]:.2f} .. {row.interval[1]:.2f}" if row.interval else "-"
    return (
        known(latency.median, latency.ci95),
        f"{row.speedup:.2f}",
        bounds,
        percent(row.efficiency),
        number(row.collective_ms),
        percent(row.repeated),
    )


def _table(one: Scaling, kind: str) -> str:
    title = f"{one.scenario}, {one.implementation}"
    rows = [(row.layout, str(row.resources), *cells(row)) for row in one.rows]
    header = (title, "on", *COLUMNS)
    table = markdown(header, rows) if kind == "md" else aligned(header, rows, words=(title, "on"))
    remark = one.remark()
    return f"{table}\n{remark}\n" if remark else table
