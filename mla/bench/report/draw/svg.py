"""Turn matplotlib figures into inline SVG: the same bytes for the same data, nothing to load."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

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
    "axes.edgecolor": "#777777",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "xtick.color": "#777777",
    "ytick.color": "#777777",
    "xtick.labelcolor": "#222222",
    "ytick.labelcolor": "#222222",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
_NUMBER = re.compile(r"(-?\d+\.\d{2})\d+")
_POINT = re.compile(r"M (\S+ \S+) L \1(?= |$)")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


@contextmanager
def styled() -> Iterator[None]:
    """Draw in the report's style, ignoring matplotlibrc."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's browser has the font
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def inline(figure: Figure, slug: str, title: str) -> str:
    """Return the figure as an `<svg>` element whose ids start with `slug` and whose title is `title`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    root = ElementTree.fromstring(buffer.getvalue())
    _drop_style(root)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(name): value for name, value in element.attrib.items()}
        _tidy(element)
    _rename(root, slug)
    box = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-labelledby": f"{slug}-title"}
    root.attrib = box
    heading = ElementTree.Element("title", {"id": f"{slug}-title"})
    heading.text = title
    root.insert(0, heading)
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
        element.attrib["style"] = re.sub(r"font-family: [^;]*(; |$)", "", element.attrib["style"])
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
