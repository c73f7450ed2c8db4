"""The built site has every page of the repository and every public name, and no link that leads nowhere."""

from __future__ import annotations

import importlib
import posixpath
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from mla import errors

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
HIDDEN = re.compile(r"(^|/)(\.[^/]+|node_modules|v?env|build|dist|site|tests)/")


class Page(NamedTuple):
    """What a page names, and where it leads."""

    anchors: list[str]
    links: list[str]


Pages = dict[str, Page]
MODULES = ("mla", "mla_backends", "mla_backends.api", "mla.bench.results")


def markdown() -> list[str]:
    """Return the repository's pages, as paths from its root."""
    paths = (path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.md"))
    return sorted(path for path in paths if not HIDDEN.search(path))


def address(path: str) -> str:
    """Return where a page of the repository is in the site."""
    return re.sub(r"(^|/)README\.md$", r"\1index.md", path).removesuffix(".md") + ".html"


@pytest.fixture(scope="module")
def pages(site: Path) -> Pages:
    """Return every page of the built site by its path."""
    texts = {path.relative_to(site).as_posix(): path.read_text("utf-8") for path in site.rglob("*.html")}
    return {
        name: Page(re.findall(r'\bid="?([^"\s>]+)', text), re.findall(r'<a\b[^>]*\bhref="?([^"\s>]*)', text))
        for name, text in texts.items()
    }


def test_pictures_have_a_text_and_nothing_comes_from_elsewhere(site: Path) -> None:
    """Dead links and anchors are refused by MkDocs itself: see `validation` in mkdocs.yml."""
    tags = [
        (path.relative_to(site).as_posix(), *tag)
        for path in site.rglob("*.html")
        for tag in re.findall(r"<(img|script|source|iframe|link)\b([^>]*)>", path.read_text("utf-8"))
    ]
    assert len(tags) > 200
    for page, tag, text in tags:
        values = dict(re.findall(r'\b(\w+)="([^"]*)"', text)) | dict(re.findall(r"\b(\w+)=([^\s\"]+)", text))
        assert tag != "img" or values.get("alt"), (page, text)
        if values.get("rel") not in ("canonical", "next", "prev"):
            fetched = [values[name] for name in ("src", "srcset", "href") if name in values]
            assert not [url for url in fetched if re.match(r"(\w+:)?//", url)], (page, text)
    styles = [path.read_text("utf-8") for path in site.rglob("*.css")]
    assert styles
    assert not re.search(r"(@import\s+|url\()[\"'(]*(\w+:)?//", "".join(styles))


def test_the_navigation_has_every_page_of_the_repository(pages: Pages) -> None:
    written = {address(path) for path in markdown()}
    assert len(written) > 20
    assert written - set(pages) == set()
    home = {posixpath.normpath(link) for link in pages["index.html"].links}
    assert written - home == set()


def test_the_home_page_has_three_doors_next_to_the_navigation(site: Path) -> None:
    html = (site / "index.html").read_text(encoding="utf-8")
    doors = html.partition('<div class="grid cards">')[2].partition("</div>")[0]
    assert re.findall(r'href="([^"]+)"', doors) == [
        f"docs/{name}.html" for name in ("benchmark", "new-backend", "transformers")
    ]
    assert re.search(r'<div class="md-sidebar md-sidebar--primary"[^>]*data-md-type="navigation"\s*>', html)


def test_anchors_are_those_that_the_forge_gives(pages: Pages) -> None:
    """A link to a heading then works in the checkout as it does in the site."""
    for path in markdown():
        text = re.sub(r"^```.*?^```", "", (ROOT / path).read_text(encoding="utf-8"), flags=re.M | re.S)
        written = [line.lstrip("# ") for line in text.splitlines() if re.match("#{1,6} ", line)]
        anchors = set(pages[address(path)].anchors)
        assert {forge_anchor(heading) for heading in written} <= anchors, path


def forge_anchor(heading: str) -> str:
    """Return the anchor of a heading: its text without markup or punctuation, in lower case, with hyphens."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", heading).strip()
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_in_the_reference(pages: Pages, module: str) -> None:
    anchors = {
        anchor for path, page in pages.items() if path.startswith("docs/api/") for anchor in page.anchors
    }
    public = vars(importlib.import_module(module))
    names = public.get("__all__") or [
        name for name, value in public.items() if not (name.startswith("_") or isinstance(value, ModuleType))
    ]
    assert len(names) >= 5
    for name in names:
        homes = (module, *(name for name in MODULES if name.startswith(module.partition(".")[0])))
        assert any(f"{home}.{name}" in anchors for home in homes), name


def test_every_error_is_in_the_reference(pages: Pages) -> None:
    shown = {anchor for anchor in pages["docs/api/core.html"].anchors if anchor.startswith("mla.errors.")}
    raised = [
        member
        for member in vars(errors).values()
        if isinstance(member, type) and issubclass(member, Exception)
    ]
    assert len(raised) > 5
    assert {f"mla.errors.{error.__name__}" for error in raised} <= shown


def test_names_in_the_text_lead_to_the_reference(pages: Pages) -> None:
    assert "../docs/api/backends.html#mla_backends.FusedOp" in pages["backends/index.html"].links
    assert "#mla.errors.CacheFull" in pages["docs/api/core.html"].links  # in a docstring


def test_shapes_in_comments_reach_the_reference(site: Path) -> None:
    text = (site / "docs/api/backends.html").read_text(encoding="utf-8")
    assert "[B, max_pages] int32" in text
    core = (site / "docs/api/core.html").read_text(encoding="utf-8")
    assert re.search(r"<li>\s*(<p>)?<code>hidden</code>: \[T, d\]", core)


def test_signatures_have_a_parameter_a_line_and_bounds_are_as_written(site: Path) -> None:
    def text(page: str, name: str) -> str:
        html = (site / "docs/api" / page).read_text(encoding="utf-8")
        return re.sub(r"<[^>]+>", "", html[html.index(f'id="{name}"') :])[:3000]

    signature = text("core.html", "mla.MLAConfig").partition("MLAConfig(")[2].partition(")")[0]
    assert len(signature.splitlines()) > 10
    assert "Meta(ge=1e-9, le=1e12)" in text("results.html", "mla.bench.results.schema.Milliseconds")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert any(
        requirement.startswith("ruff") for requirement in extras["optional-dependencies"]["docs"]
    )  # formats them
