"""Pictures of the cases themselves: along a grid, as bars, under their limits, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence

from mla.bench.report import charts, tables
from mla.bench.report.panel import MOST_ROWS, Context, Picture, cut_note, file_title, is_short, row_names
from mla.bench.report.roofline_chart import roofline as draw_roofline
from mla.bench.report.roofline_data import Roofline, roofline
from mla.bench.report.series import (
    AXES,
    LATENCY,
    THROUGHPUT,
    Curves,
    Entry,
    Workload,
    bars,
    curves,
    grouped,
    workload,
)
from mla.bench.report.style import DARK, Look, Palette, Swatch
from mla.bench.terminal.stages import wholes

BOTH = (LATENCY, THROUGHPUT)
#: Lines of one picture.
MOST_LINES = 8


def against_grid(context: Context) -> list[Picture]:
    """Return latency and throughput along every axis of a grid."""
    found = [part for axis in AXES for one in curves(context.entries, axis) for part in _readable(one)]
    return [_curves(context, f"grid-{place}", one) for place, one in enumerate(found)]


def _readable(found: Curves) -> list[Curves]:
    """Split curves that are too many for one picture by the other values of the grid."""
    if len(found.lines) <= MOST_LINES:
        return [found]
    groups = grouped(found.lines, lambda line: line.others).values()
    return [Curves(found.workload, found.axis, lines) for lines in groups]


def _curves(context: Context, slug: str, found: Curves) -> Picture:
    others = list(dict.fromkeys(line.others for line in found.lines))
    look = Look(context.colours, Palette(others))
    title = f"{context.titles[found.workload]}: against {AXES[found.axis]}"
    title += f", {others[0]}" if len(others) == 1 and others[0] else ""
    legend = context.legend(line.entry for line in found.lines)
    if len(others) > 1:
        shapes = look.shapes
        legend += [Swatch(one, DARK, shapes.marker(one), shapes.dash(one)) for one in others if one]
    return Picture(
        slug,
        title,
        [charts.curve(f"{slug}-{q.name}", f"{title}: {q.name}", found, q, look) for q in BOTH],
        legend,
        tables=[tables.curve(found, BOTH)],
    )


def scenarios(context: Context) -> list[Picture]:
    """Return a bar chart per workload of the cases that no curve shows."""
    groups = enumerate(bars(context.entries).items())
    return [_bars(context, f"bars-{place}", which, found) for place, (which, found) in groups]


def _bars(context: Context, slug: str, which: Workload, found: list[Entry]) -> Picture:
    drawn, title = found[:MOST_ROWS], context.titles[which]
    look = Look(context.colours, Palette(()))
    drawing = charts.bars(slug, f"{title}: latency and throughput", row_names(drawn), drawn, BOTH, look)
    notes = [_key(drawn), *cut_note(drawn, found)]
    return Picture(slug, title, [drawing], [], notes, [tables.bars(found, BOTH)])


def _key(found: Sequence[Entry]) -> str:
    """Say which files the letters of a picture mean."""
    labels = dict.fromkeys((entry.source.key, entry.source.run.backend.device) for entry in found)
    return "; ".join(f"{key}: {device}" if key else device for key, device in labels)


def rooflines(context: Context) -> list[Picture]:
    """Return the roofline of every file that has a number."""
    found = [roofline(source) for source in context.files]
    return [_roofline(context, f"roofline-{place}", one) for place, one in enumerate(found) if one.dots]


def _roofline(context: Context, slug: str, found: Roofline) -> Picture:
    members = [dot.entry for dot in found.dots]
    bases = list(dict.fromkeys(entry.case.base for entry in members))
    look = Look(context.colours, Palette(bases))
    title = file_title(found.source)
    legend = context.legend(members) + [Swatch(base, DARK, look.shapes.marker(base)) for base in bases]
    drawing = draw_roofline(slug, f"roofline: {title}", found, look)
    notes = [] if found.roofs else ["This file knows no limit, so there is no roof to draw."]
    shown = [tables.roofline(found)] + [tables.roofs(found.roofs)] * bool(found.roofs)
    return Picture(slug, title, [drawing], legend, notes, shown, is_short(shown[0]))


def breakdown(context: Context) -> list[Picture]:
    """Return the stages of every workload that was taken apart."""
    groups = grouped((entry for entry in context.entries if entry.case.stages), workload)
    return [
        _stages(f"stages-{place}", context.titles[which], found)
        for place, (which, found) in enumerate(groups.items())
    ]


def _stages(slug: str, title: str, found: list[Entry]) -> Picture:
    drawn = found[:MOST_ROWS]
    names = list(dict.fromkeys(stage.name for entry in drawn for stage in wholes(entry.case.stages)))
    colours = Palette(names)
    drawing = charts.stages(slug, f"{title}: stages of a forward", row_names(drawn), drawn, colours)
    legend = [*(Swatch(name, colours[name]) for name in names), Swatch("the whole forward", DARK, "|")]
    return Picture(slug, title, [drawing], legend, cut_note(drawn, found), [tables.stages(found)])
