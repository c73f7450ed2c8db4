"""Panels of the cases themselves: along a grid, as bars, under their roofs, stage by stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mla.bench.report import findings, tables
from mla.bench.report.draw import bar_charts, line_charts
from mla.bench.report.draw.roofline_chart import roofline as draw_roofline
from mla.bench.report.draw.style import DARK, Look, Palette, Swatch
from mla.bench.report.draw.svg import Caption
from mla.bench.report.names import slug as file_name
from mla.bench.report.panel import (
    ALL_ROWS,
    Context,
    Panel,
    Picture,
    case_name,
    chunks,
    cut_note,
    is_short,
    numbered,
    row_names,
)
from mla.bench.report.roofline_data import RooflineData, roofline
from mla.bench.report.series import (
    AXES,
    LATENCY,
    THROUGHPUT,
    Curves,
    Quantity,
    ReportEntry,
    Workload,
    bars,
    curves,
    grouped,
    with_numbers,
    workload,
)
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
    base, axis = context.titles[group.workload], "history" if group.axis == "kv" else group.axis
    title = f"by {axis}" if base == axis else f"{base}, by {axis}"
    title += f", {others[0]}" if len(others) == 1 and others[0] else ""
    pictures, complete = [], True
    for quantity in BOTH:
        name, found = f"{quantity.name.title()}: {title}", findings.of_curves(group, quantity)
        caption = Caption(f"{slug}-{quantity.name}", name, found)
        svg, named = line_charts.curve(caption, group, quantity, look)
        pictures.append(Picture(file_name(f"{title} {quantity.name}"), caption, svg))
        complete = complete and named
    members = [line.entry for line in group.lines]
    legend = [] if complete else _line_legend(context, members, kinds, look)
    notes = [*_key(members), *_no_number([entry for line in group.lines for _, entry in line.absent])]
    tabled = [tables.curve(group, BOTH)]
    return Panel(slug, title, context.subject(members), pictures, legend, notes, tabled)


def _line_legend(
    context: Context, members: Sequence[ReportEntry], kinds: Sequence[str], look: Look
) -> list[Swatch]:
    """Return what colours with dashes, and what markers stand for."""
    names = dict.fromkeys(entry.case.implementation for entry in members)
    legend = [Swatch(name, context.colours[name], dash=look.dashes.dash(name)) for name in names]
    told = [name for name in kinds if name and len(kinds) > 1]
    return legend + [Swatch(name, DARK, look.shapes.marker(name)) for name in told]


def scenarios(context: Context) -> list[Panel]:
    """Return a bar chart per workload of the cases that are on no curve."""
    groups = enumerate(bars(context.entries).items())
    return [_bars(context, f"bars-{place}", which, cases) for place, (which, cases) in groups]


def _bars(context: Context, slug: str, which: Workload, cases: list[ReportEntry]) -> Panel:
    drawn, title = cases[:ALL_ROWS], context.titles[which]
    parts = [(quantity, part) for part in chunks(drawn) for quantity in BOTH if with_numbers(part)]
    pictures = [
        _bar_picture(context, f"{slug}-{place}", title, quantity, part)
        for place, (quantity, part) in enumerate(parts)
    ]
    legend = [Swatch("the limit of the device", DARK, "|")]
    legend *= any(bar_charts.has_own_limits(part, quantity) for quantity, part in parts)
    absent = [one for one in context.entries if workload(one) == which and not one.case.point]
    notes = [*_key(drawn), *cut_note(drawn, cases), *_yardsticks(absent), *_no_number(absent)]
    subject = context.subject(drawn)
    return Panel(slug, title, subject, pictures, legend, notes, [tables.bars(cases, BOTH)])


def _bar_picture(
    context: Context, slug: str, title: str, quantity: Quantity, entries: Sequence[ReportEntry]
) -> Picture:
    names = row_names(entries)
    name = f"{quantity.name.title()}: {title}"
    caption = Caption(slug, name, findings.of_bars(entries, names, quantity))
    svg = bar_charts.bars(caption, names, entries, quantity, context.colours)
    return Picture(file_name(f"{title} {quantity.name}"), caption, svg)


def _key(cases: Sequence[ReportEntry]) -> Iterator[str]:
    """Yield which file each letter of a panel stands for."""
    files = dict.fromkeys((one.file.key, one.file.name) for one in cases if one.file.key)
    if files:
        yield "; ".join(f"{key}: {name}" for key, name in files) + "."


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
    where = f", {data.file.title}" if data.file.key else ""
    caption = Caption(slug, f"Roofline: distance to the limits{where}", findings.of_roofline(data))
    svg, left_out, named = draw_roofline(caption, data, look)
    legend = context.legend(members) + [Swatch(base, DARK, look.shapes.marker(base)) for base in bases]
    legend *= not named
    notes = [] if data.roofs else ["This file has no limits, so there is no roof to draw."]
    notes += [f"There was no room for {left_out} of the labels; the tables have them."] * bool(left_out)
    notes += [
        f"In doubt: {case_name(one.case)}: {one.case.roofline.doubt}"
        for one in members
        if one.case.roofline.doubt
    ]
    shown = [tables.roofline(data)] + [tables.roofs(data.roofs)] * bool(data.roofs)
    pictures = [Picture(file_name(f"roofline {data.file.key}"), caption, svg)]
    subject = context.subject(members)
    title = f"Distance to the limits{where}"
    return Panel(slug, title, subject, pictures, legend, notes, shown, is_short(shown[0]))


def breakdown(context: Context) -> list[Panel]:
    """Return the stages of every workload that has some."""
    groups = grouped((entry for entry in context.entries if entry.case.stages), workload)
    return [
        _stages(context, f"stages-{place}", context.titles[which], cases)
        for place, (which, cases) in enumerate(groups.items())
    ]


def _stages(context: Context, slug: str, title: str, cases: list[ReportEntry]) -> Panel:
    drawn = cases[:ALL_ROWS]
    names = list(dict.fromkeys(stage.name for entry in drawn for stage in wholes(entry.case.stages)))
    colours = Palette(names)
    pictures = []
    for place, part in enumerate(chunks(drawn)):
        rows = row_names(part)
        caption = Caption(
            numbered(f"{slug}-chart", place), f"Stages of a forward: {title}", findings.of_stages(part, rows)
        )
        svg = bar_charts.stages(caption, rows, part, colours)
        pictures.append(Picture(file_name(f"{title} stages"), caption, svg))
    legend = [*(Swatch(name, colours[name]) for name in names), Swatch("the whole forward", DARK, "|")]
    notes = [*_key(drawn), *cut_note(drawn, cases)]
    return Panel(slug, title, context.subject(drawn), pictures, legend, notes, [tables.stages(cases)])


def new_lengths(context: Context) -> list[Panel]:
    """Return, for every file that has some, forwards on lengths that nothing had seen before."""
    timed = grouped((one for one in context.entries if one.case.new_lengths), lambda one: one.file.key)
    return [
        Panel(
            f"lengths-{place}",
            f"Lengths never seen before{': ' * bool(members[0].file.key)}{members[0].file.key}",
            context.subject(members),
            tables=[tables.new_lengths(members)],
            alongside=True,
        )
        for place, members in enumerate(timed.values())
    ]
