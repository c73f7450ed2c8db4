"""Panels of the cases themselves: along a grid, as bars, under their roofs, stage by stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mla.bench.report import tables
from mla.bench.report.draw import charts
from mla.bench.report.draw.roofline_chart import roofline as draw_roofline
from mla.bench.report.panel import (
    MOST_ROWS,
    Context,
    Panel,
    case_name,
    cut_note,
    file_title,
    is_short,
    row_names,
)
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
from mla.bench.terminal.digits import number
from mla.bench.terminal.stages import wholes
from mla.bench.terminal.verdict import is_yardstick, status

BOTH = (LATENCY, THROUGHPUT)
# Most lines in one chart, and most charts into which those of one axis are split.
MOST_LINES, MOST_PARTS = 8, 6


def against_grid(context: Context) -> list[Panel]:
    """Return latency and throughput along every axis of a grid."""
    panels: list[Panel] = []
    for group in (one for axis in AXES for one in curves(context.entries, axis)):
        parts = _readable(group)
        drawn = _spread(parts)
        panels += [_curves(context, f"grid-{len(panels) + place}", part) for place, part in enumerate(drawn)]
        if len(drawn) < len(parts):
            panels[-1].notes.append(
                f"{len(drawn)} of {len(parts)} such charts are drawn; the results have all."
            )
    return panels


def _readable(group: Curves) -> list[Curves]:
    """Split curves that are too many for one chart by the other values of the grid."""
    if len(group.lines) <= MOST_LINES:
        return [group]
    parts = grouped(group.lines, lambda line: line.others).values()
    return [Curves(group.workload, group.axis, lines) for lines in parts]


def _spread(parts: Sequence[Curves]) -> list[Curves]:
    """Return at most `MOST_PARTS` parts from the first to the last, evenly spaced."""
    if len(parts) <= MOST_PARTS:
        return list(parts)
    return [parts[place * (len(parts) - 1) // (MOST_PARTS - 1)] for place in range(MOST_PARTS)]


def _curves(context: Context, slug: str, group: Curves) -> Panel:
    others = list(dict.fromkeys(line.others for line in group.lines))
    kinds = list(dict.fromkeys(line.shape for line in group.lines))
    look = Look(context.colours, Palette(kinds))
    title = f"{context.titles[group.workload]}: against {AXES[group.axis]}"
    title += f", {others[0]}" if len(others) == 1 and others[0] else ""
    legend = context.legend(line.entry for line in group.lines)
    if len(kinds) > 1:
        shapes = look.shapes
        legend += [Swatch(name, DARK, shapes.marker(name), shapes.dash(name)) for name in kinds if name]
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
    absent = [entry for entry in context.entries if workload(entry) == which and not entry.case.point]
    notes = [_key(drawn), *cut_note(drawn, cases), *_yardsticks(absent), *_no_number(absent)]
    return Panel(slug, title, [drawing], [], notes, [tables.bars(cases, BOTH)])


def _key(cases: Sequence[ReportEntry]) -> str:
    """Return which file and device each letter of a panel stands for."""
    files = dict.fromkeys((one.file.key, one.file.name, one.file.run.backend.device) for one in cases)
    return "; ".join(f"{key}: {name} on {device}" if key else device for key, name, device in files)


def _yardsticks(cases: Sequence[ReportEntry]) -> Iterator[str]:
    """Yield what is measured for orientation, in words: a bar of it would flatten all others."""
    for entry in cases:
        rate = entry.case.tokens_per_s
        if is_yardstick(entry.case) and entry.case.latency_ms:
            numbers = (
                f"{number(entry.case.latency_ms.median)} ms, {number(rate.median if rate else None)} tok/s"
            )
            why = entry.case.check.reason or "it computes nothing"
            yield f"Yardstick, not drawn: {entry.name}, {numbers} ({why})."


def _no_number(cases: Sequence[ReportEntry]) -> Iterator[str]:
    names = [f"{one.name} ({status(one.case)})" for one in cases if one.case.latency_ms is None]
    if names:
        yield f"No number: {', '.join(names)}."


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
    drawing, left_out = draw_roofline(slug, f"roofline: {title}", data, look)
    notes = [] if data.roofs else ["This file has no limits, so there is no roof to draw."]
    notes += [f"There was no room for {left_out} of the labels; the tables have them."] * bool(left_out)
    notes += [
        f"In doubt: {case_name(one.case)}: {one.case.roofline.doubt}"
        for one in members
        if one.case.roofline.doubt
    ]
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


def new_lengths(context: Context) -> list[Panel]:
    """Return, for every file that has some, forwards on lengths that nothing had seen before."""
    timed = grouped((one for one in context.entries if one.case.new_lengths), lambda one: one.file.key)
    return [
        Panel(
            f"lengths-{place}",
            file_title(members[0].file),
            tables=[tables.new_lengths(members)],
            alongside=True,
        )
        for place, members in enumerate(timed.values())
    ]
