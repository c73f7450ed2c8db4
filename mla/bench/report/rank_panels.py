"""The panels about ranks: what each did of a case that was spread over several."""

from __future__ import annotations

from mla.bench.report.panel import Context, Panel, file_title
from mla.bench.report.series import ReportEntry, grouped
from mla.bench.report.tables import Table
from mla.bench.results.shares import repeated
from mla.bench.terminal.digits import number
from mla.bench.terminal.ranks import COLUMNS, percent, rows

INTRO = (
    "Layers spread over several ranks. A case's latency is that of its slowest rank, forward by forward, "
    "from a common start. Collectives were clocked in a pass of their own, and include waiting for others; "
    "imbalance is how much longer a rank works than the median one, collectives left out. Repeated is the "
    "share of what all ranks do that one device would not, of FLOPs or of bytes, whichever limits the case."
)
_HEAD = ("scenario", "implementation", "layout", *COLUMNS, "repeated")


def ranks(context: Context) -> list[Panel]:
    """Return, for every file with cases over several ranks, a table of them."""
    spread = [entry for entry in context.entries if entry.case.spread]
    groups = grouped(spread, lambda entry: entry.file.key)
    return [
        Panel(f"ranks-{place}", file_title(members[0].file), tables=[_table(members)], alongside=True)
        for place, members in enumerate(groups.values())
    ]


def _table(entries: list[ReportEntry]) -> Table:
    found = []
    for entry in entries:
        case, spread = entry.case, entry.case.spread
        assert spread is not None
        where = (case.scenario, case.implementation, f"{spread.layout} over {spread.library}")
        again = repeated(case)
        share = percent(again.of(case.roofline.bound) if again else None)
        found += [[*where, *row, share] for row in rows(spread, number)]
    return Table(_HEAD, found, 3)
