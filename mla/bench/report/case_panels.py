"""Panels of the cases themselves: along a grid, as bars, under their roofs, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence

from mla.bench.report import charts, tables
from mla.bench.report.panel import MOST_ROWS, Context, Panel, cut_note, file_title, is_short, row_names
from mla.bench.report.roofline_chart import roofline as draw_roofline
from mla.bench.report.roofline_data import RooflineData, roofline
from mla.bench.report.series import (
    AXES,
    LATENCY,
    THROUGHPUT,
    Curves,
    ReportEntry,
    Workload,
    bars,
    curves,
    grouped,
    workload,
)
from mla.bench.report.style import DARK, Look, Palette, Swatch
from mla.bench.terminal.stages import wholes

BOTH = (LATENCY, THROUGHPUT)
# Most lines in one chart.
MOST_LINES = 8


def against_grid(context: Context) -> list[Panel]:
    """Return latency and throughput along every axis of a grid."""
    groups = [part for axis in AXES for group in curves(context.entries, axis) for part in _readable(group)]
    return [_curves(context, f"grid-{place}", group) for place, group in enumerate(groups)]


def _readable(group: Curves) -> list[Curves]:
    """Split curves that are too many for one chart by the other values of the grid."""
    if len(group.lines) <= MOST_LINES:
        return [group]
    parts = grouped(group.lines, lambda line: line.others).values()
    return [Curves(group.workload, group.axis, lines) for lines in parts]


def _curves(context: Context, slug: str, group: Curves) -> Panel:
    others = list(dict.fromkeys(line.others for line in group.lines))
    look = Look(context.colours, Palette(others))
    title = f"{context.titles[group.workload]}: against {AXES[group.axis]}"
    title += f", {others[0]}" if len(others) == 1 and others[0] else ""
    legend = context.legend(line.entry for line in group.lines)
    if len(others) > 1:
        shapes = look.shapes
        legend += [Swatch(name, DARK, shapes.marker(name), shapes.dash(name)) for name in others if name]
    return Panel(
        slug,
        title,
        [charts.curve(f"{slug}-{q.name}", f"{title}: {q.name}", group, q, look) for q in BOTH],
        legend,
        tables=[tables.curve(group, BOTH)],
    )


def scenarios(context: Context) -> list[Panel]:
    """Return a bar chart per workload of the cases that are on no curve."""
    groups = enumerate(bars(context.entries).items())
    return [_bars(context, f"bars-{place}", which, cases) for place, (which, cases) in groups]


def _bars(context: Context, slug: str, which: Workload, cases: list[ReportEntry]) -> Panel:
    drawn, title = cases[:MOST_ROWS], context.titles[which]
    look = Look(context.colours, Palette(()))
    drawing = charts.bars(slug, f"{title}: latency and throughput", row_names(drawn), drawn, BOTH, look)
    notes = [_key(drawn), *cut_note(drawn, cases)]
    return Panel(slug, title, [drawing], [], notes, [tables.bars(cases, BOTH)])


def _key(cases: Sequence[ReportEntry]) -> str:
    """Return which device each letter of a panel stands for."""
    labels = dict.fromkeys((entry.file.key, entry.file.run.backend.device) for entry in cases)
    return "; ".join(f"{key}: {device}" if key else device for key, device in labels)


def rooflines(context: Context) -> list[Panel]:
    """Return the roofline of every file that has a number."""
    rooflines = enumerate(map(roofline, context.files))
    return [_roofline(context, f"roofline-{place}", data) for place, data in rooflines if data.dots]


def _roofline(context: Context, slug: str, data: RooflineData) -> Panel:
    members = [dot.entry for dot in data.dots]
    bases = list(dict.fromkeys(entry.case.base for entry in members))
    look = Look(context.colours, Palette(bases))
    title = file_title(data.file)
    legend = context.legend(members) + [Swatch(base, DARK, look.shapes.marker(base)) for base in bases]
    drawing = draw_roofline(slug, f"roofline: {title}", data, look)
    notes = [] if data.roofs else ["This file has no limits, so there is no roof to draw."]
    shown = [tables.roofline(data)] + [tables.roofs(data.roofs)] * bool(data.roofs)
    return Panel(slug, title, [drawing], legend, notes, shown, is_short(shown[0]))


def breakdown(context: Context) -> list[Panel]:
    """Return the stages of every workload that has some."""
    groups = grouped((entry for entry in context.entries if entry.case.stages), workload)
    return [
        _stages(f"stages-{place}", context.titles[which], cases)
        for place, (which, cases) in enumerate(groups.items())
    ]


def _stages(slug: str, title: str, cases: list[ReportEntry]) -> Panel:
    drawn = cases[:MOST_ROWS]
    names = list(dict.fromkeys(stage.name for entry in drawn for stage in wholes(entry.case.stages)))
    colours = Palette(names)
    drawing = charts.stages(slug, f"{title}: stages of a forward", row_names(drawn), drawn, colours)
    legend = [*(Swatch(name, colours[name]) for name in names), Swatch("the whole forward", DARK, "|")]
    return Panel(slug, title, [drawing], legend, cut_note(drawn, cases), [tables.stages(cases)])
