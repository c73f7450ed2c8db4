"""Turn matplotlib figures into inline SVG: the same bytes for the same data, nothing to load."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from mla.bench.report.draw.theme import paint, variables
from mla.bench.report.series import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Text stays text, so it can be searched and copied; the page names fonts as wide as the layout's.
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mla",
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": paint("ink"),
    "axes.prop_cycle": f"cycler(color=[{paint('ink')!r}])",
    "axes.labelcolor": paint("ink"),
    "axes.edgecolor": paint("axis"),
    "axes.axisbelow": True,
    "grid.color": paint("grid"),
    "grid.linewidth": 0.6,
    "xtick.color": paint("axis"),
    "ytick.color": paint("axis"),
    "xtick.labelcolor": paint("ink"),
    "ytick.labelcolor": paint("ink"),
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
# Inches. A chart is as wide as a phone, where its text has about 11 pixels; screens show some side by side.
WIDTH = 4.0
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
_NUMBER = re.compile(r"(-?\d+\.\d{2})\d+")
_POINT = re.compile(r"M (\S+ \S+) L \1(?= |$)")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


@dataclass(frozen=True)
class Caption:
    """What a picture is called: what it shows, and what can be seen in it."""

    slug: str
    title: str
    finding: str


@contextmanager
def styled() -> Iterator[None]:
    """Draw in the report's style, ignoring matplotlibrc."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's browser has the font
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def inline(figure: Figure, caption: Caption) -> str:
    """Return the figure as an `<svg>` element that says in words what it shows.

    Its ids start with the slug, and its colours are variables of the page around it.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    root = ElementTree.fromstring(buffer.getvalue())
    _drop_style(root)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(name): value for name, value in element.attrib.items()}
        _tidy(element)
    _rename(root, caption.slug)
    words = {"title": caption.title, "desc": caption.finding}
    named = " ".join(f"{caption.slug}-{tag}" for tag in words)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-labelledby": named}
    for place, (tag, text) in enumerate(words.items()):
        element = ElementTree.Element(tag, {"id": f"{caption.slug}-{tag}"})
        element.text = printable(text)
        root.insert(place, element)
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _drop_style(root: ElementTree.Element) -> None:
    """Remove the style element: inline, its `*` would apply to the whole page."""
    for parent in list(root.iter()):
        for child in [node for node in parent if _local(node.tag) in ("style", "metadata")]:
            parent.remove(child)


def _tidy(element: ElementTree.Element) -> None:
    """Round coordinates to a hundredth of a point and drop the whitespace of the layout."""
    for name in ("d", "x", "y", "transform"):
        if name in element.attrib:
            rounded = _NUMBER.sub(r"\1", element.attrib[name])
            element.attrib[name] = _POINT.sub(r"M\1h0", re.sub(r"\s+", " ", rounded).strip())
    if element.attrib.get("transform", "").startswith("rotate(-0 "):
        del element.attrib["transform"]
    if "style" in element.attrib:
        style = re.sub(r"font-family: [^;]*(; |$)", "", element.attrib["style"])
        element.attrib["style"] = variables(style)
    for name in ("fill", "stroke"):
        if name in element.attrib:
            element.attrib["style"] = variables(f"{name}: {element.attrib.pop(name)}")
    if element.tag not in ("text", "tspan"):
        element.text = None
    element.tail = None


def _rename(root: ElementTree.Element, slug: str) -> None:
    """Keep only the ids that are referred to, and make them unique within the page."""
    used = {node.attrib["href"][1:] for node in root.iter() if "href" in node.attrib}
    for element in root.iter():
        for value in element.attrib.values():
            used.update(_REFERENCE.findall(value))
    for element in root.iter():
        identity = element.attrib.pop("id", None)
        if identity in used:
            element.attrib["id"] = f"{slug}-{identity}"
        for name, value in element.attrib.items():
            if name == "href":
                element.attrib[name] = f"#{slug}-{value[1:]}"
            elif "url(#" in value:
                element.attrib[name] = _REFERENCE.sub(rf"url(#{slug}-\1)", value)
