"""Make the relative links of all READMEs absolute, in place: on a package index relative ones lead nowhere.

    python packaging/absolute_links.py https://forge.example/owner/mla v0.1.0

The release runs this on its own checkout before it builds, where it knows its address and its tag. It also
enters the address into every pyproject.toml, as the page of the source and of the changes.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from distributions import ROOT, distributions, readmes

# [text](target), src="target" and the like, but for targets with a scheme or inside the page.
_LINK = re.compile(
    r"""(?P<before>\]\(|\b(?:src|srcset|href)=")(?!\w+:|\#)(?P<target>[^)"\s#]+)(?P<after>[^)"\s]*[)"])"""
)
_PICTURES = {".svg", ".png", ".jpg", ".jpeg", ".gif", ".webp"}  # a forge shows a page about them elsewhere


def absolute(text: str, folder: Path, base: str, tag: str) -> str:
    """Return a page in `folder` with its links made absolute. Raises ValueError for a dead one."""

    def replace(match: re.Match[str]) -> str:
        found = (folder / match["target"]).resolve()
        if not found.exists():
            raise ValueError(f"{folder / 'README.md'} links to {match['target']}, which is not there.")
        kind = "tree" if found.is_dir() else "raw" if found.suffix in _PICTURES else "blob"
        return f"{match['before']}{base}/{kind}/{tag}/{found.relative_to(ROOT).as_posix()}{match['after']}"

    return _LINK.sub(replace, text)


def rewrite(base: str, tag: str) -> None:
    """Rewrite all READMEs, and add the project's addresses to all pyproject.toml."""
    for page in readmes():
        page.write_text(absolute(page.read_text(encoding="utf-8"), page.parent, base, tag), encoding="utf-8")
    urls = f'\n[project.urls]\nSource = "{base}"\nChangelog = "{base}/blob/{tag}/CHANGELOG.md"\n'
    for one in distributions():
        project = one.folder / "pyproject.toml"
        project.write_text(project.read_text(encoding="utf-8") + urls, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the tree that this file is in; exit code 1 for a link that leads nowhere."""
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
