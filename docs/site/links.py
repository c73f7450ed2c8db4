"""Links from a page to what the site does not hold: source files and folders of the repository."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit
from xml.etree.ElementTree import Element

from markdown import Markdown
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor


def repository(environment: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """Return the repository's address and the commit being built, as GitHub Actions says; else ("", "")."""
    names = ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY", "GITHUB_SHA")
    server, name, commit = (environment.get(variable, "") for variable in names)
    return (f"{server}/{name}", commit) if server and name and commit else ("", "")


class SourceLinks(Extension):
    """Links to a folder lead to its README; links to source lead to the repository, or are plain text."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        self.files: set[str] = set()  # what the site holds, as paths from the root
        self.page = ""  # the path of the page that is being rendered

    def extendMarkdown(self, md: Markdown) -> None:
        """Come before MkDocs, which resolves the links between pages and warns about the others."""
        md.treeprocessors.register(_Resolve(md, self), "source-links", 1)

    def resolve(self, link: Element) -> None:
        """Change one link in place. One that leads nowhere is left to MkDocs, which refuses it."""
        parts = urlsplit(link.get("href", ""))
        if parts.scheme or parts.netloc or not parts.path or parts.path.startswith("/"):
            return
        target = posixpath.normpath(posixpath.join(posixpath.dirname(self.page), unquote(parts.path)))
        if target in self.files or not (self.root / target).exists() or target.startswith(".."):
            return
        if posixpath.join(target, "README.md") in self.files:
            link.set("href", parts._replace(path=posixpath.join(parts.path, "README.md")).geturl())
            return
        url, commit = repository()
        if url:
            kind = "tree" if (self.root / target).is_dir() else "blob"
            link.set("href", parts._replace(path=f"{url}/{kind}/{commit}/{target}").geturl())
        else:
            link.tag = "span" if link.find(".//code") is not None else "code"
            link.attrib = {"title": target}


class _Resolve(Treeprocessor):
    def __init__(self, md: Markdown, links: SourceLinks) -> None:
        super().__init__(md)
        self.links = links

    def run(self, root: Element) -> None:
        for link in root.iter("a"):
            self.links.resolve(link)
