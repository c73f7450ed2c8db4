"""Every picture of a report as an SVG file of its own: with title, legend and colours that need no page."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import get_args
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from mla.bench.report import series
from mla.bench.report.draw import theme
from mla.bench.report.draw.style import Swatch
from mla.bench.report.panel import Context, Panel, Picture
from mla.bench.report.sections import sections
from mla.bench.results.cases import labelled
from mla.bench.results.schema import Run
from mla.command import files
from mla.errors import ResultError

# How every picture starts; only a file that starts like this is overwritten.
START = "<!-- Made by python -m mla.bench report. -->\n"
PICTURE = files.Kind("a picture of a report", lambda data: data.startswith(START.encode()))
# Points: the margin, the sizes of the title and of other lines, and their distance.
MARGIN, TITLE, TEXT, LEADING = 10.0, 10.5, 9.0, 1.35
# Width of a letter as a share of its size: rather too wide than too narrow.
LETTER = 0.62
_VARIABLE = re.compile(r"var\(--([\w-]+)\)")


def render(paths: Sequence[str], runs: Sequence[Run], only: Collection[str] = ()) -> dict[str, str]:
    """Return the SVGs of all pictures by their names, such as "decode-latency-light.svg".

    If slugs of sections are given, `only` their pictures are drawn.
    """
    made: dict[str, str] = {}
    for panel, picture in _pictures(paths, runs, only):
        name, count = picture.name, 1
        while f"{name}-light.svg" in made:
            count += 1
            name = f"{picture.name}-{count}"
        for mode in get_args(theme.Mode):
            made[f"{name}-{mode}.svg"] = alone(panel, picture, mode)
    return made


def _pictures(
    paths: Sequence[str], runs: Sequence[Run], only: Collection[str]
) -> Iterator[tuple[Panel, Picture]]:
    context = Context(series.result_files(paths, list(map(labelled, runs))))
    for section in sections(context, only):
        for panel in section.panels:
            yield from ((panel, picture) for picture in panel.drawings)


def alone(panel: Panel, picture: Picture, mode: theme.Mode) -> str:
    """Return a picture that carries everything it needs, on paper of its own."""
    chart = ElementTree.fromstring(picture.svg)
    width, height = map(float, chart.attrib["viewBox"].split()[2:])
    whole = Element("svg", chart.attrib | {"xmlns": "http://www.w3.org/2000/svg"})
    for words in chart.findall("title") + chart.findall("desc"):
        chart.remove(words)
        whole.append(words)
    paper = SubElement(whole, "rect", {"width": "100%", "height": "100%"})
    paper.set("style", f"fill: {theme.var('paper')}")
    top = _header(whole, panel, picture, width)
    size = {"x": f"{MARGIN}", "y": f"{top:.1f}", "width": f"{width:g}", "height": f"{height:g}"}
    chart.attrib = {"viewBox": chart.attrib["viewBox"], **size}
    whole.append(chart)
    across, down = width + 2 * MARGIN, top + height + MARGIN
    whole.attrib |= {"viewBox": f"0 0 {across:g} {down:.1f}", "width": f"{1.5 * across:.0f}"}
    whole.attrib |= {"height": f"{1.5 * down:.0f}", "font-family": "DejaVu Sans, Verdana, Geneva, sans-serif"}
    return START + _coloured(ElementTree.tostring(whole, encoding="unicode"), mode)


def _coloured(svg: str, mode: theme.Mode) -> str:
    """Return an SVG with colours in place of their names: viewers other than browsers know no variables."""
    return _VARIABLE.sub(lambda found: str(getattr(theme.THEME[found[1]], mode)), svg)


def _header(whole: Element, panel: Panel, picture: Picture, width: float) -> float:
    """Write title, subject and legend; return where the chart begins."""
    place = MARGIN
    lines = [(line, TITLE, "ink", "bold") for line in _wrapped(picture.caption.title, width, TITLE)]
    lines += [(line, TEXT, "soft", "normal") for line in _wrapped(panel.subject, width, TEXT)]
    for line, size, colour, weight in lines:
        place += size * LEADING
        style = f"font-size: {size:g}px; font-weight: {weight}; fill: {theme.var(colour)}"
        SubElement(whole, "text", {"x": f"{MARGIN:g}", "y": f"{place:.1f}", "style": style}).text = line
    return _legend(whole, panel.legend, place, width) + TEXT / 2


def _wrapped(text: str, width: float, size: float) -> list[str]:
    return textwrap.wrap(series.printable(text), int(width / (LETTER * size)), break_on_hyphens=False)


def _legend(whole: Element, swatches: Sequence[Swatch], place: float, width: float) -> float:
    """Write swatches with their names in rows; return the end of the last."""
    left = width
    for swatch in swatches:
        text = series.printable(swatch.text, int((width - 40) / (LETTER * TEXT)))
        needed = 34 + LETTER * TEXT * len(text)
        if left + needed > width:
            left, place = 0.0, place + 1.2 * TEXT * LEADING
        _swatch(whole, swatch, MARGIN + left, place)
        style = f"font-size: {TEXT:g}px; fill: {theme.var('ink')}"
        spot = {"x": f"{MARGIN + left + 20:.1f}", "y": f"{place:.1f}", "style": style}
        SubElement(whole, "text", spot).text = text
        left += needed
    return place


def _swatch(whole: Element, one: Swatch, left: float, base: float) -> None:
    """Draw what a series looks like, 16 points wide."""
    group = SubElement(whole, "g", {"transform": f"translate({left:.1f} {base - 11:.1f})"})
    if one.dash is not None:
        style = f"stroke: {one.paint}; stroke-width: 2; stroke-dasharray: {one.dashes or 'none'}"
        SubElement(group, "path", {"d": "M0 8h16", "style": f"fill: none; {style}"})
    if one.path or one.dash is None:
        SubElement(group, "path", {"d": one.path or "M1 3h14v10h-14z", "style": f"fill: {one.paint}"})


def check_folder(folder: Path) -> None:
    """Raise `ResultError` if pictures cannot be written into `folder`, which need not exist."""
    if folder.exists() and not folder.is_dir():
        raise ResultError(f"cannot write pictures into '{folder}': it is a file; name a folder.")
    if not folder.exists():
        files.check_writable(folder)


def write(made: dict[str, str], folder: Path) -> None:
    """Write pictures into a folder, making it. Raises `ResultError`, writing nothing, for a foreign file."""
    for name in made:
        if (folder / name).exists():
            files.check_writable(folder / name, PICTURE)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ResultError(f"cannot make the folder '{folder}': {error.strerror}.") from error
    for name, svg in made.items():
        files.write_bytes(svg.encode("utf-8", "replace"), folder / name)
