"""MkDocs hook: the site is the repository's own markdown, each page under its own path."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))  # MkDocs loads this file by its path, without a package

from links import SourceLinks, repository
from names import NameLinks, shown
from pictures import for_both_themes

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "*.md",
    "docs/**/*.md",
    "backends/README.md",
    "benchmarks/**/*.md",
    "packaging/*.md",
    "plugins/*/README.md",
)
ASSETS = ("docs/**/*.{}", "benchmarks/**/*.{}")
KINDS = ("svg", "png", "webp", "jpg", "html")

DOORS = re.compile(r"((?:^\* .+\n(?:  .+\n)*)+)", re.MULTILINE)  # the first list of the README
HEADING = re.compile(r"(#+) ")

source_links = SourceLinks(ROOT)


def matching(*patterns: str) -> list[str]:
    """Return the files of the repository that match, as paths from its root."""
    paths = {path for pattern in patterns for path in ROOT.glob(pattern)}
    this_folder = Path(__file__).parent
    return sorted(path.relative_to(ROOT).as_posix() for path in paths if this_folder not in path.parents)


def on_config(config: MkDocsConfig) -> None:
    """Put pages in the place of the navigation's patterns, and say where the source is, if that is known."""
    config.nav = expanded(config.nav, matching(*PAGES))
    reference = ROOT / "docs" / "api"
    names = NameLinks(shown(reference / "core.md", reference / "backends.md"))
    config.markdown_extensions += [source_links, names]
    url, commit = repository()
    if url:  # not `repo_url`: the theme would ask the forge about it from every reader's browser
        config.nav.append({"Repository": url})
        config.copyright += f' · <a href="{url}/tree/{commit}">source, {commit[:8]}</a>'


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the repository's pages and pictures."""
    from mkdocs.structure.files import File

    for path in matching(*PAGES, *(asset.format(kind) for asset in ASSETS for kind in KINDS)):
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    source_links.files = {file.src_uri for file in files}


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Say which page is rendered to what resolves links, and write what only a site can show."""
    source_links.page = page.file.src_uri
    if page.is_homepage:
        page.meta["hide"] = ["toc"]  # so that the terminal's table fits a laptop
        markdown = DOORS.sub(r'<div class="grid cards" markdown>\n\n\1\n</div>\n', markdown, count=1)
    if page.file.src_uri.startswith("docs/api/"):
        markdown = "".join(with_options(markdown))
    return for_both_themes(markdown)


def with_options(markdown: str) -> Iterator[str]:
    """Yield a page of the reference: names one level below their heading, classes of data with all fields."""
    level = 1
    for line in markdown.splitlines(keepends=True):
        if heading := HEADING.match(line):
            level = len(heading[1])
        yield line
        if line.startswith("::: "):
            more = ", show_if_no_docstring: true, show_bases: false" * line.startswith("::: mla.bench.")
            yield f"    options: {{ heading_level: {level + 1}{more} }}\n\n"


def expanded(nav: Any, pages: Iterable[str]) -> Any:
    """Replace the patterns of a navigation: a page that it does not name goes to the longest that matches."""
    entries = list(_leaves(nav))
    taken: dict[str, list[str]] = {entry: [] for entry in entries if "*" in entry}
    for page in pages:
        matches = [pattern for pattern in taken if fnmatch(page, pattern)]
        if page not in entries and matches:
            taken[max(matches, key=len)].append(page)
    return _replaced(nav, taken)


def _leaves(nav: Any) -> Iterator[str]:
    """Yield every path and pattern of a navigation."""
    if isinstance(nav, str):
        yield nav
    else:
        for item in nav.values() if isinstance(nav, dict) else nav:
            yield from _leaves(item)


def _replaced(nav: Any, taken: dict[str, list[str]]) -> Any:
    if isinstance(nav, dict):
        return {title: _replaced(item, taken) for title, item in nav.items()}
    if isinstance(nav, list):
        items = (
            taken.get(item, [item]) if isinstance(item, str) else [_replaced(item, taken)] for item in nav
        )
        return list(chain.from_iterable(items))
    return nav
