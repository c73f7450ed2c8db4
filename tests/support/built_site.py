"""A built site as a browser would meet it: the links, anchors and resources of every page."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What a browser fetches by itself: tag -> attributes. A link in `a` is fetched when a reader asks.
_FETCHED = {
    "audio": ("src",),
    "embed": ("src",),
    "iframe": ("src",),
    "image": ("href",),
    "img": ("src", "srcset"),
    "input": ("src",),
    "link": ("href",),
    "object": ("data",),
    "script": ("src",),
    "source": ("src", "srcset"),
    "use": ("href",),
    "video": ("src", "poster"),
}
_IN_STYLE = re.compile(r"""(?:@import\s+(?:url\(\s*)?|url\(\s*)["']?(?!data:|#)([^"')\s;]+)""")

# Ends of the addresses of pictures that the theme shows on light or on dark paper only.
_CONDITIONS = ["only-light", "only-dark"]


@dataclass
class Page:
    """One page: what it names, what it fetches, where it leads; `pictures` are the texts of its images."""

    anchors: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page = Page()
        self._style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        page = self.page
        page.anchors += [values[name] for name in ("id", "name") if name in values and tag != "meta"]
        if tag == "a" and "href" in values:
            page.links.append(values["href"])
        if not (tag == "link" and values.get("rel") in ("canonical", "next", "prev")):
            page.fetched += [
                url for name in _FETCHED.get(tag, ()) for url in _urls(name, values.get(name, ""))
            ]
        page.fetched += _IN_STYLE.findall(values.get("style", ""))
        if tag == "img":
            page.pictures.append(values.get("alt", ""))
        self._style = tag == "style"

    def handle_data(self, data: str) -> None:
        if self._style:
            self.page.fetched += _IN_STYLE.findall(data)


def _urls(name: str, value: str) -> list[str]:
    """Return the addresses in an attribute; a srcset has several, each with a size."""
    parts = [part.split()[0] for part in value.split(",") if part.strip()] if name == "srcset" else [value]
    return [url for url in parts if url and not url.startswith("data:")]


def read_page(text: str) -> Page:
    """Return what a page holds."""
    reader = _Reader()
    reader.feed(text)
    return reader.page


def read_site(folder: Path) -> dict[str, Page]:
    """Return every page of a site by its path from `folder`."""
    return {
        path.relative_to(folder).as_posix(): read_page(path.read_text(encoding="utf-8"))
        for path in sorted(folder.rglob("*.html"))
    }


def faults(folder: Path, pages: dict[str, Page]) -> Iterator[str]:
    """Yield what is wrong with a site: dead links and anchors, unnamed pictures, things from elsewhere."""
    for name, page in pages.items():
        for text in page.pictures:
            if not text.strip():
                yield f"{name}: a picture has no text"
        yield from (f"{name}: fetches {url}" for url in page.fetched if _outside(url))
        for url in (*page.fetched, *page.links):
            if not _outside(url) and (fault := _dead(folder, pages, name, url)):
                yield f"{name}: {url} {fault}"
    for sheet in sorted(folder.rglob("*.css")):
        for url in _IN_STYLE.findall(sheet.read_text(encoding="utf-8")):
            if _outside(url):
                yield f"{sheet.relative_to(folder)}: fetches {url}"


def _outside(url: str) -> bool:
    parts = urlsplit(url)
    return bool(parts.scheme or parts.netloc)


def _dead(folder: Path, pages: dict[str, Page], name: str, url: str) -> str:
    """Return why a link inside the site leads nowhere, or ""."""
    path, anchor = urlsplit(url).path, unquote(urlsplit(url).fragment)
    if path.startswith("/") and name != "404.html":  # a site may lie below the root of its host
        return "is absolute"
    target = posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(path))) if path else name
    target = target.lstrip("/") or "."
    if (folder / target).is_dir():
        target = posixpath.normpath(posixpath.join(target, "index.html"))
    if target.startswith("..") or not (folder / target).is_file():
        return "is not there"
    known = pages[target].anchors if target in pages else _CONDITIONS
    return "has no such anchor" if anchor and anchor not in known else ""
