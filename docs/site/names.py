"""Names of the API reference in running text lead to the reference, from every page and docstring."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree.ElementTree import Element

from markdown import Markdown
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor

_SHOWN = re.compile(r"^::: (\S+\.([A-Z]\w+))$", re.MULTILINE)
_LEFT_ALONE = {"a", "autoref", "h1", "h2", "h3", "h4", "h5", "h6", "pre"}


def shown(*pages: Path) -> dict[str, str]:
    """Return the classes that pages of the reference show: name -> identifier."""
    matches = (match for page in pages for match in _SHOWN.finditer(page.read_text(encoding="utf-8")))
    return {match[2]: match[1] for match in matches}


class NameLinks(Extension):
    """Turn `Name` into what mkdocs-autorefs makes a link of."""

    def __init__(self, names: dict[str, str]) -> None:
        super().__init__()
        self.names = names

    def extendMarkdown(self, md: Markdown) -> None:
        """Come after inline code has become elements."""
        md.treeprocessors.register(_Link(md, self.names), "name-links", 2)


class _Link(Treeprocessor):
    def __init__(self, md: Markdown, names: dict[str, str]) -> None:
        super().__init__(md)
        self.names = names

    def run(self, root: Element) -> None:
        """Wrap every `code` below `root` that is a name and not yet part of a link or heading."""
        for place, child in enumerate(root):
            if child.tag == "code" and (identifier := self.names.get(child.text or "")):
                link = Element("autoref", {"identifier": identifier})
                link.tail, child.tail = child.tail, None
                link.append(child)
                root[place] = link
            elif child.tag not in _LEFT_ALONE:
                self.run(child)
