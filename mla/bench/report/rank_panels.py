"""The panels about ranks: what each did of a case that was spread over several."""

from __future__ import annotations

from mla.bench.report.panel import Context, Panel, file_title
from mla.bench.report.series import ReportEntry, grouped
from mla.bench.report.tables import Table
from mla.bench.results.stats import median
from mla.bench.terminal.digits import number
from mla.bench.terminal.ranks import imbalance
from mla.text import size

INTRO = (
    "Layers spread over several ranks. A case's latency is that of its slowest rank, forward by forward, "
    "from a common start. Collectives were clocked in a pass of their own, and include waiting for others; "
    "imbalance is how much longer the busiest rank works than all do on average, collectives left out."
)
_HEAD = ("scenario", "implementation", "layout", "rank", "ms", "collectives ms")
_MORE = ("sent in a forward", "cache", "weights", "imbalance")


def ranks(context: Context) -> list[Panel]:
    """Return, for every file with cases over several ranks, a table of them."""
    spread = [entry for entry in context.entries if entry.case.spread]
    groups = grouped(spread, lambda entry: entry.file.key)
    return [
        Panel(f"ranks-{place}", file_title(members[0].file), tables=[_table(members)], alongside=True)
        for place, members in enumerate(groups.values())
    ]


def _table(entries: list[ReportEntry]) -> Table:
    rows = []
    for entry in entries:
        spread = entry.case.spread
        assert spread is not None
        where = (entry.case.scenario, entry.case.implementation, f"{spread.layout} over {spread.library}")
        for one in spread.ranks:
            times = (number(median(one.samples)), number(one.collective_ms))
            sizes = map(size, (one.collective_bytes, one.cache_bytes, one.weight_bytes))
            rows.append([*where, str(one.rank), *times, *sizes, f"{imbalance(spread):.0%}"])
    return Table((*_HEAD, *_MORE), rows, 3)
