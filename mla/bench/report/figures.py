"""The two figures: bars with a limit, and curves: along a grid, or under a roof. Plain rows in, SVG out."""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle, pairwise
from typing import Any, Literal, NamedTuple

import matplotlib
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mla.bench.results.schema import Interval
from mla.bench.terminal.digits import number

Draw = Callable[[Figure], None]
# Text has about 15 pixels in a wide chart on a page, and 11 in a narrow one on a phone.
WIDE_INCHES, NARROW_INCHES = 10.0, 4.4
# Inches of a line of text, and of a letter: rather too wide than too narrow.
LINE, LETTER = 0.19, 0.087
# A bar this many times as long as the next shorter one is broken off: the others could not be told apart.
FLATTENS = 8.0
# Most ticks on the axis of a grid: more would overlap.
MOST_TICKS = 7
MARKERS = ("o", "s", "^", "D", "v", "p", ">", "<")
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (9, 3)))
# Where a text is that stands to the right of a mark.
_BESIDE: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
# What stands in a chart for a case without a number, by the status of its check, and its colour.
MISSING = {"wrong": ("✗", "wrong"), "doubtful": ("?", "doubt"), "not run": ("\N{EN DASH}", "amber")}


class Chart(NamedTuple):
    """One drawing, and what it shows in words: `finding` is its caption and its alternative text."""

    name: str  # of its files: lower case, without extension
    title: str
    subject: str
    finding: str
    draw: Draw


class Row(NamedTuple):
    """A bar; without a `value`, `text` says why. `mark` is its limit."""

    name: str
    value: float | None
    bounds: Interval | None
    text: str
    colour: str  # of the theme
    mark: float | None = None
    status: str = "ok"
    doubt: bool = False


class Point(NamedTuple):
    """A point of a line; one without a `value` is marked at the axis by its status."""

    x: float
    value: float | None
    bounds: Interval | None = None
    status: str = "ok"
    doubt: bool = False


class Line(NamedTuple):
    """A line, or marks alone if it has no dash, and its entry in a legend. `colour` is of the theme."""

    name: str
    colour: str
    marker: str = ""
    dash: Any = ""
    points: Sequence[Point] = ()


def svg(chart: Chart, mode: Mode, width: float, *, titled: bool = False) -> str:
    """Return a chart as SVG, `width` inches wide: the same bytes for the same data, nothing to load."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's browser has the font
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(rc(mode))
        figure, buffer = Figure(figsize=(width, 3), layout="constrained"), io.StringIO()
        chart.draw(figure)
        if titled:
            title, subject = (
                textwrap.fill(text, int(width / LETTER)) for text in (chart.title, chart.subject)
            )
            text = f"{title}\n{subject}".strip()
            figure.set_figheight(figure.get_figheight() + LINE * (text.count("\n") + 1.5))
            figure.suptitle(text, x=0.01, ha="left", size=10.5)
        about = {"Creator": "python -m mla.bench report", "Title": f"{chart.title}. {chart.finding}"}
        figure.savefig(buffer, format="svg", metadata={"Date": None, **about})
    return buffer.getvalue()


def wrapped(name: str) -> str:
    """Return a name for a chart, in at most three lines; one with a list of ops is wrapped behind a comma."""
    spaced = name.replace(",", ", ").replace(",  ", ", ")
    return "\n".join(textwrap.wrap(spaced, 44, max_lines=3, placeholder="…", break_on_hyphens=False))


def bars(rows: Sequence[Row]) -> Draw:
    """Draw latencies in ms with whiskers, each with a mark at its limit; one without a number says why."""

    def draw(figure: Figure) -> None:
        axes, height = _rows(figure, [row.name for row in rows], 0.22)
        known = [row for row in rows if row.value is not None]
        reach = _reach(row.value or 0.0 for row in known)
        limits = [row.mark for row in known if row.mark and row.mark < FLATTENS * reach]
        highs = [row.bounds[1] for row in known if row.bounds]
        whole = 1.05 * max([reach, *limits, *(high for high in highs if high < 1.6 * reach)])
        for place, row in enumerate(rows):
            _bar(axes, place, row, height, whole)
        axes.set_xlim(0, whole * (1 + 1.3 / figure.get_figwidth()))
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
        axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.10g}"))
        axes.set_xlabel("latency, ms")
        if limits:
            text = f"limit {number(limits[0])} ms" if is_shared(rows) else "limit of the device"
            _legend(figure, [Line(text, "ink", "|")])

    return draw


def is_shared(rows: Sequence[Row]) -> bool:
    """Return whether every row with a number has the same limit."""
    limits = [row.mark or 0.0 for row in rows if row.value is not None]
    return bool(limits) and 0 < max(limits) <= 1.01 * min(limits)


def _bar(axes: Axes, place: int, row: Row, height: float, whole: float) -> None:
    if row.value is None:
        (sign, colour), spot = MISSING.get(row.status, MISSING["not run"]), axes.get_yaxis_transform()
        axes.text(0, place, f"{sign} {row.text}", va="center", color=paint(colour), transform=spot)
        return
    broken, (low, high) = row.value > whole, row.bounds or (row.value, row.value)
    (bar,) = axes.barh(place, min(row.value, whole), height, color=paint(row.colour))
    if row.doubt:
        bar.set(facecolor="none", edgecolor=paint(row.colour), hatch="////")
    low, end = min(low, whole), min(high, whole)
    if row.bounds and not broken:
        axes.errorbar((low + end) / 2, place, xerr=(end - low) / 2, color=paint("ink"))
    far = f" (to {number(high)})" if high > whole and not broken else ""
    text = f"{'» ' * broken}{row.text}{' ?' * row.doubt}{far}"
    axes.annotate(text, (min(max(end, row.value), whole), place), **_BESIDE)
    if row.mark and row.mark <= whole:
        reach = height / 2 + 0.03
        axes.vlines(row.mark, place - reach, place + reach, color=paint("ink"), linewidth=1.8)


def _rows(figure: Figure, names: Sequence[str], thickness: float) -> tuple[Axes, float]:
    """Return axes where row k is at y = k, its name above it, and the height of rows (`thickness` inches)."""
    names = [wrapped(name) for name in names]
    pitch = thickness + LINE * (1 + max(name.count("\n") for name in names)) + 0.12
    figure.set_figheight(0.6 + pitch * len(names))
    axes, height, gap = figure.add_subplot(), thickness / pitch, 0.06 / pitch
    axes.set_ylim(len(names) - 1 + height / 2 + gap, height / 2 + gap - 1)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    behind = {"facecolor": paint("paper"), "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
    for place, name in enumerate(names):
        spot = axes.get_yaxis_transform()
        axes.text(0, place - (height + gap) / 2, name, va="bottom", transform=spot, bbox=behind)
    return axes, height


def _reach(values: Iterable[float]) -> float:
    """Return where bars end: before a few that are so long that most others would vanish."""
    ordered = sorted(values)
    for place, (shorter, longer) in enumerate(pairwise(ordered), start=1):
        if longer > FLATTENS * shorter and place >= max(2, len(ordered) / 2):
            return shorter
    return ordered[-1] if ordered else 1.0


def curves(
    lines: Sequence[Line],
    limits: Sequence[Line],
    labels: tuple[str, str],
    *,
    legend: Sequence[Line] = (),
    ticks: bool = True,
) -> Draw:
    """Draw lines with whiskers, and limits, over the values of an axis; both axes are logarithmic.

    `ticks`: at the places of points, that are counts. `legend`: other entries than all lines.
    """

    def draw(figure: Figure) -> None:
        figure.set_figheight(3.6)
        axes = figure.add_subplot()
        for line in (*lines, *limits):
            _line(axes, line)
        _log(axes, "x", {point.x for line in lines for point in line.points} if ticks else ())
        _log(axes, "y")
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        _legend(figure, [*(legend or lines), *limits])

    return draw


def _line(axes: Axes, line: Line) -> None:
    known = [(point, point.value) for point in line.points if point.value is not None]
    ends = [point.bounds or (value, value) for point, value in known]
    xs, ys = [point.x for point, _ in known], [value for _, value in known]
    # A stored interval need not hold its value: matplotlib refuses lengths below 0.
    down = [max(0.0, y - low) for y, (low, _) in zip(ys, ends, strict=True)]
    up = [max(0.0, high - y) for y, (_, high) in zip(ys, ends, strict=True)]
    style: dict[str, Any] = {"color": paint(line.colour), "marker": line.marker}
    whiskers = [down, up] if line.marker else None
    look = (
        {"markersize": 5} if len(line.points) > 1 else {"markersize": 8, "alpha": 0.6}
    )  # what lies below shows
    axes.errorbar(xs, ys, whiskers, linestyle=line.dash, linewidth=1.4, **style, **look)
    for point in line.points:
        if point.value is None:
            (sign, colour), spot = MISSING.get(point.status, MISSING["not run"]), axes.get_xaxis_transform()
            axes.text(point.x, 0.02, sign, color=paint(colour), transform=spot, ha="center", size=12)
        elif point.doubt:
            axes.plot(point.x, point.value, **style, markersize=7, markerfacecolor=paint("paper"), zorder=4)


def _legend(figure: Figure, lines: Sequence[Line]) -> None:
    """Write what lines and marks stand for below the chart, in as many columns as fit, and make room."""
    names = [wrapped(line.name) for line in lines]
    handles = [
        Line2D([], [], c=paint(line.colour), marker=line.marker, ms=7, ls=line.dash, label=name)
        for line, name in zip(lines, names, strict=True)
    ]
    longest = max(len(part) for name in names for part in name.splitlines())
    columns = min(len(names), max(1, int(figure.get_figwidth() / (LETTER * longest + 0.55))))
    height = math.ceil(sum(1 + name.count("\n") for name in names) / columns)
    figure.set_figheight(figure.get_figheight() + LINE * (height + 0.6))
    figure.legend(handles=handles, loc="outside lower left", ncols=columns)


def _log(axes: Axes, side: str, places: Iterable[float] = ()) -> None:
    """Make an axis logarithmic, with ticks at `places`, or else at round numbers or powers of ten."""
    axis, ticks = axes.xaxis if side == "x" else axes.yaxis, sorted(places)
    # A history of 0 has no logarithm.
    scale = {"value": "symlog", "linthresh": max([1.0, *ticks[1:2]])} if 0 in ticks else {"value": "log"}
    (axes.set_xscale if side == "x" else axes.set_yscale)(**scale)
    low, high = axis.get_view_interval()
    decades = 0 if ticks else math.log10(high / low)
    locator: ticker.Locator = ticker.LogLocator(subs=(1, 2, 5) if decades < 2 else (1,), numticks=9)
    if decades < 0.8:
        locator = ticker.MaxNLocator(5, steps=[1, 2, 5, 10])
    if ticks:
        locator = ticker.FixedLocator(ticks[:: -math.ceil(len(ticks) / MOST_TICKS)][::-1])
    axis.set_major_locator(locator)
    count = ticker.FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x and x % 1024 == 0 else f"{x:g}")
    axis.set_major_formatter(count if ticks else ticker.StrMethodFormatter("{x:,.10g}"))
    axis.set_minor_locator(ticker.NullLocator())


# ---------------------------------------------------------------------------------------------------- themes

Mode = Literal["light", "dark"]


class Tone(NamedTuple):
    """One colour as it looks on light and on dark paper."""

    light: str
    dark: str


# What series are drawn in. In both modes each has a contrast of at least 3 to the paper, and any two differ
# for every kind of colour vision. The first three are Okabe and Ito's.
SERIES: dict[str, Tone] = {
    "s1": Tone("#0072b2", "#3e95d0"),
    "s2": Tone("#d55e00", "#f2873b"),
    "s3": Tone("#009e73", "#43cf86"),
    "s4": Tone("#c27aab", "#f59ebd"),
    "s5": Tone("#0093ff", "#9dceff"),
    "s6": Tone("#744800", "#ffd243"),
    "s7": Tone("#222222", "#fff6f8"),
    "s8": Tone("#882255", "#bd6192"),
    "s9": Tone("#929551", "#beef7c"),
}
# Text, at least 4.5 to the paper; axes, at least 3; and what only guides the eye.
THEME: dict[str, Tone] = {
    **SERIES,
    "ink": Tone("#1c1c1c", "#e8e8e6"),
    "soft": Tone("#595959", "#a9adb2"),
    "link": Tone("#0057a0", "#7db8f0"),
    "good": Tone("#00664b", "#5fd0a5"),
    "wrong": Tone("#b00020", "#ff8a93"),
    "doubt": Tone("#6a2c91", "#cfa0f2"),
    "amber": Tone("#8a5200", "#e9b44c"),
    "axis": Tone("#777777", "#8a8f96"),
    "paper": Tone("#ffffff", "#15181c"),
    "code": Tone("#f4f4f2", "#1f2429"),
    "rule": Tone("#dcdcdc", "#3a4047"),
    "grid": Tone("#e0e0e0", "#2e343a"),
}
# Implementations that have the same colour in every report, by their place in the palette.
KNOWN = ("mla", "mla-reference", "transformers", "transformers-eager")
_PLACES = {name: f"C{place}" for place, name in enumerate(THEME)}


def paint(name: str) -> str:
    """Return what matplotlib calls the colour `name` under the settings of `rc`, in either mode."""
    return _PLACES[name]


def css(mode: Mode) -> str:
    """Return the declarations that give every name its colour in one mode."""
    return " ".join(f"--{name}: {getattr(tone, mode)};" for name, tone in THEME.items())


def rc(mode: Mode) -> dict[Any, Any]:
    """Return matplotlib's settings for one mode; all others are its defaults.

    Text stays text, so that it can be searched and copied; it is never mathematics.
    """
    tones = {name: getattr(tone, mode) for name, tone in THEME.items()}
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "mla",
        "text.parse_math": False,
        "font.sans-serif": ["DejaVu Sans", "Verdana", "Geneva"],
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.prop_cycle": f"cycler(color={list(tones.values())!r})",
        "axes.edgecolor": tones["axis"],
        "axes.facecolor": "none",
        "axes.labelcolor": tones["ink"],
        "figure.facecolor": tones["paper"],
        "grid.color": tones["grid"],
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "errorbar.capsize": 2.5,
        "text.color": tones["ink"],
        **{f"{axis}tick.color": tones["axis"] for axis in "xy"},
        **{f"{axis}tick.labelcolor": tones["ink"] for axis in "xy"},
    }


def colours(names: Iterable[str]) -> dict[str, str]:
    """Return a colour per implementation, the same in all charts; those of `KNOWN` are in all reports."""
    styles = dict(zip(KNOWN, SERIES, strict=False))
    rest = cycle([*list(SERIES)[len(KNOWN) :], *SERIES])
    return styles | dict(zip(sorted(set(names) - set(KNOWN)), rest, strict=False))
