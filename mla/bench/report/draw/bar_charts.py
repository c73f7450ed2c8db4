"""Bars: a quantity of every case with its limit, and the stages of a forward end to end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mla.bench.report.draw import chart_axes
from mla.bench.report.draw.rows import LINE, Rows
from mla.bench.report.draw.style import MISSING, Colours, Palette
from mla.bench.report.draw.svg import WIDTH, Caption, inline, styled
from mla.bench.report.draw.theme import paint
from mla.bench.report.series import Measure, Quantity, ReportEntry, shared_limit
from mla.bench.results.schema import Case
from mla.bench.terminal.digits import number
from mla.bench.terminal.stages import total, wholes
from mla.bench.terminal.verdict import status

# A stage needs this many points a letter to be named, of about 270 that the longest bar has.
LETTER, ACROSS = 5.3, 270


@styled()
def bars(
    caption: Caption,
    names: Sequence[str],
    entries: Sequence[ReportEntry],
    quantity: Quantity,
    colours: Colours,
) -> str:
    """Draw a quantity of cases as bars with whiskers, under their limit; one without a number says why."""
    limits = [quantity.limit(entry.case) for entry in entries]
    shared = shared_limit(entries, quantity)
    rows = Rows(names, head=LINE + 0.04 if shared else 0.0)
    figure = Figure(figsize=(WIDTH, 0.55 + rows.height), layout="constrained")
    axes = figure.add_subplot()
    rows.set(axes)
    measures = [quantity.of(entry.case) for entry in entries]
    known, floors = [one for one in measures if one], [one for one in limits if one]
    whole = chart_axes.bar_scale(axes, known, floors, break_off=not quantity.higher_is_better)
    for middle, entry, measure, limit in zip(rows.middles, entries, measures, limits, strict=True):
        if measure is None:
            _absent(axes, middle, entry.case)
            continue
        drawn = chart_axes.within(measure, whole)
        _bar(axes, middle, rows.bar, drawn, colours[entry.case.implementation], entry.case)
        mark = " ?" if entry.case.roofline.doubt else ""
        chart_axes.end_label(axes, middle, rows.bar, measure, whole, mark)
        if limit and not shared:
            axes.plot([limit] * 2, [middle - 0.13, middle + 0.13], color=paint("ink"), linewidth=1.6)
    if shared:
        _limit_line(axes, shared, quantity)
    axes.set_xlabel(f"{quantity.name}, {quantity.unit}")
    return inline(figure, caption)


def has_own_limits(entries: Sequence[ReportEntry], quantity: Quantity) -> bool:
    """Return whether rows have limits of their own, drawn as marks that a legend explains."""
    return any(quantity.limit(entry.case) for entry in entries) and not shared_limit(entries, quantity)


def _bar(axes: Axes, middle: float, height: float, measure: Measure, colour: str, case: Case) -> None:
    style: dict[str, Any] = {"facecolor": paint(colour), "edgecolor": paint(colour), "linewidth": 0.8}
    if case.roofline.doubt:
        style |= {"hatch": "////", "facecolor": paint("paper")}
    axes.barh(
        middle,
        measure.value,
        height=height,
        xerr=chart_axes.whiskers([measure]),
        error_kw={"ecolor": paint("ink"), "capsize": 2.5, "elinewidth": 1},
        **style,
    )


def _absent(axes: Axes, middle: float, case: Case) -> None:
    sign, colour = MISSING.get(case.check.status, MISSING["not run"])
    axes.text(
        0,
        middle,
        f"{sign} {status(case)}: no number",
        va="center",
        color=paint(colour),
        transform=axes.get_yaxis_transform(),
    )


def _limit_line(axes: Axes, limit: float, quantity: Quantity) -> None:
    axes.axvline(limit, color=paint("ink"), linewidth=1, linestyle=(0, (4, 2)))
    left = limit < sum(axes.get_xlim()) / 2
    axes.annotate(
        f"limit {number(limit)} {quantity.unit}",
        (limit, 0),
        xytext=(4 if left else -4, 0),
        textcoords="offset points",
        va="top",
        ha="left" if left else "right",
    )


@styled()
def stages(caption: Caption, names: Sequence[str], entries: Sequence[ReportEntry], colours: Palette) -> str:
    """Draw the stages of every case end to end, with a mark for the whole forward."""
    rows = Rows(names, bar=0.28)
    figure = Figure(figsize=(WIDTH, 0.55 + rows.height), layout="constrained")
    axes = figure.add_subplot()
    rows.set(axes)
    longest = max(total(entry.case.stages) for entry in entries)
    for middle, entry in zip(rows.middles, entries, strict=True):
        _stacked(axes, middle, entry.case, colours, longest)
        if entry.case.latency_ms is not None:
            median = entry.case.latency_ms.median
            axes.plot([median] * 2, [middle - 0.2, middle + 0.2], color=paint("ink"), linewidth=2)
    axes.set_xlim(left=0)
    axes.set_xlabel("ms, stage after stage")
    return inline(figure, caption)


def _stacked(axes: Axes, middle: float, case: Case, colours: Palette, longest: float) -> None:
    """Draw stages one after another; each has its name and time, or its time alone, where that fits."""
    start = 0.0
    for stage in wholes(case.stages):
        colour, ms = colours[stage.name], number(stage.ms)
        axes.barh(
            middle,
            stage.ms,
            left=start,
            height=0.26,
            color=paint(colour),
            edgecolor=paint("paper"),
            linewidth=0.8,
        )
        room = math.floor((ACROSS * stage.ms / longest - 4) / LETTER)
        text = next((text for text in (f"{stage.name} {ms}", ms) if len(text) <= room), "")
        axes.text(
            start + stage.ms / 2, middle, text, color=paint(f"on-{colour}"), ha="center", va="center", size=9
        )
        start += stage.ms
