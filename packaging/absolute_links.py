"""Make the relative links of all READMEs absolute, in place: on a package index relative ones lead nowhere.

    python packaging/absolute_links.py https://forge.example/owner/mla v0.1.0

The release runs this on its own checkout before it builds, where it knows its address and its tag. It also
enters the address into every pyproject.toml, as the page of the source and of the changes. It runs once:
afterwards no link is relative, and a second tag would be lost.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from distributions import ROOT, distributions, readmes

# Code, which holds no links: fenced blocks, and spans between equally many backquotes.
_CODE = re.compile(
    r"(^ {0,3}(`{3,}|~{3,}).*?(?:^ {0,3}\2[`~]*\s*$|\Z)|(?<!`)(`+)(?!`).+?(?<!`)\3(?!`))", re.M | re.S
)
# The start of [text](target "title"), [name]: target and src='target', and the target up to its fragment,
# but for targets with a scheme or inside the page.
_LINK = re.compile(
    r"""(?P<before>\]\(\s*<?|^\ {0,3}\[[^]\n]+\]:\s+<?|\b(?:src|srcset|href)=["'])"""
    r"""(?!\w+:|//|\#)(?P<target>[^)>"'\s#]+)""",
    re.M | re.X,
)
_PICTURES = {".svg", ".png", ".jpg", ".jpeg", ".gif", ".webp"}  # a forge shows a page about them elsewhere


def absolute(text: str, folder: Path, base: str, tag: str) -> str:
    """Return a page in `folder` with its links made absolute. Raises ValueError for a dead one."""
    page = folder / "README.md"

    def replace(match: re.Match[str]) -> str:
        target = (folder / match["target"]).resolve()
        if not target.is_relative_to(ROOT):
            raise ValueError(f"{page} links to {match['target']}: it is outside of the repository.")
        if not target.exists():
            raise ValueError(f"{page} links to {match['target']}: it does not exist.")
        kind = "tree" if target.is_dir() else "raw" if target.suffix in _PICTURES else "blob"
        return f"{match['before']}{base}/{kind}/{tag}/{target.relative_to(ROOT).as_posix()}"

    parts, end = [], 0
    for code in _CODE.finditer(text):
        parts += [_LINK.sub(replace, text[end : code.start()]), code[0]]
        end = code.end()
    return "".join(parts) + _LINK.sub(replace, text[end:])


def rewrite(base: str, tag: str) -> None:
    """Rewrite all READMEs, and add the project's addresses to all pyproject.toml, or raise ValueError."""
    urls = f'\n[project.urls]\nSource = "{base}"\nChangelog = "{base}/blob/{tag}/CHANGELOG.md"\n'
    new: dict[Path, str] = {}
    for distribution in distributions():
        project = distribution.folder / "pyproject.toml"
        text = project.read_text(encoding="utf-8")
        if "[project.urls]" in text:
            raise ValueError(f"{project} has [project.urls]: this runs once, on a fresh checkout.")
        new[project] = text + urls
    for page in readmes():
        new[page] = absolute(page.read_text(encoding="utf-8"), page.parent, base, tag)
    for path, text in new.items():
        path.write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the tree that this file is in; exit code 1 for a dead link, and for a second run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", metavar="URL", help="address of the repository on its forge")
    parser.add_argument("tag", metavar="TAG", help="what the links show")
    options = parser.parse_args(arguments)
    try:
        rewrite(options.base.rstrip("/"), options.tag)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
