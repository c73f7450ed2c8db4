"""The panels about ranks: what each did of a case that was spread over several, and how cases scale."""

from __future__ import annotations

from collections.abc import Sequence

from mla.bench.report import findings
from mla.bench.report.draw import line_charts
from mla.bench.report.draw.line_charts import Relative
from mla.bench.report.draw.style import DARK, Swatch
from mla.bench.report.draw.svg import Caption
from mla.bench.report.names import slug as file_name
from mla.bench.report.panel import (
    ALL_ROWS,
    Context,
    Panel,
    Picture,
    chunks,
    cut_note,
    file_title,
    is_short,
    numbered,
)
from mla.bench.report.series import Measure, ReportEntry, ResultFile, grouped
from mla.bench.report.tables import Table
from mla.bench.results.cases import repeated
from mla.bench.results.scaling import Scaled, Scaling
from mla.bench.results.scaling import scaling as scaling_of
from mla.bench.terminal.comparison import SCALING_COLUMNS, scaling_cells
from mla.bench.terminal.ranks import COLUMNS, percent, rows

RANKS = (
    "Layers spread over several ranks. A case's latency is that of its slowest rank, forward by forward, "
    "from a common start. Collectives were clocked in a pass of their own, and include waiting for others; "
    "imbalance is how much longer a rank works than the median one, collectives left out: as these are of "
    "another pass, a few percent mean nothing. Measured limits are those of rank 0. Repeated is the "
    "share of what all ranks do that one device would not, of FLOPs or of bytes, whichever limits the case."
)
SCALING = (
    "Cases over several ranks, and on other numbers of threads, as multiples of the speed on one device. The "
    "mark is the ideal: as many times as fast as there are cores or devices. Efficiency is the share of it "
    "that is reached; what a layout repeats on its ranks, and time in collectives, is lost."
)
_IDEAL = Swatch("ideal", DARK, "|")
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
        found += [[*where, *row, share] for row in rows(spread)]
    return Table(_HEAD, found, 3)


def scaling(context: Context) -> list[Panel]:
    """Return, for every implementation that is there on one device and over ranks, how it scales."""
    found = scaling_of([file.run for file in context.files])
    groups = grouped(found, lambda one: one.implementation)
    return [
        _panel(context, f"scaling-{place}", name, members)
        for place, (name, members) in enumerate(groups.items())
    ]


def _panel(context: Context, slug: str, name: str, members: Sequence[Scaling]) -> Panel:
    every = [(one, row) for one in members for row in one.rows[1:]]
    drawn = every[:ALL_ROWS]
    dots = [_dots(row, context.colours[row.case.implementation]) for _, row in drawn]
    pictures = []
    for place, (part, some) in enumerate(zip(chunks(drawn), chunks(dots), strict=True)):
        names = [f"{one.scenario}: {_where(row)}" for one, row in part]
        told = [(text, row.speedup, row.efficiency) for text, (_, row) in zip(names, part, strict=True)]
        caption = Caption(
            numbered(f"{slug}-chart", place), f"Strong scaling: {name}", findings.of_scaling(told)
        )
        svg = line_charts.relative(caption, names, some, "speedup over one device", dots)
        pictures.append(Picture(file_name(f"scaling {name}"), caption, svg))
    colours = dict.fromkeys(row.case.implementation for _, row in drawn)
    legend = [*(Swatch(one, context.colours[one], "o") for one in colours), _IDEAL]
    table = _scaling_table(context.files, members)
    return Panel(
        slug, name, _subject(members), pictures, legend, cut_note(drawn, every), [table], is_short(table)
    )


def _dots(row: Scaled, colour: str) -> list[Relative]:
    """Return the ideal and what was reached."""
    reached = Relative(Measure(row.speedup, *(row.interval or (None, None))), colour, "o")
    ideal = [Relative(Measure(row.ideal, None, None), DARK, "|", named=False)] if row.ideal else []
    return [*ideal, reached]


def _where(row: Scaled) -> str:
    return f"{row.layout}, {row.resources}"


def _subject(members: Sequence[Scaling]) -> str:
    """Return what cases are compared with, and which have no efficiency for it."""
    bases = dict.fromkeys(str(one.base) for one in members)
    remarks = dict.fromkeys(filter(None, (one.remark() for one in members)))
    return "; ".join(["against one device: " + "; ".join(bases), *remarks])


def _scaling_table(files: Sequence[ResultFile], members: Sequence[Scaling]) -> Table:
    head = ["file", "scenario", "layout", "on", *SCALING_COLUMNS]
    lines = [
        [files[row.run].key, one.scenario, row.layout, str(row.resources), *scaling_cells(row)]
        for one in members
        for row in one.rows
    ]
    return Table(head, lines, 4, caption="scaling")
