"""Check that this tree is what a tag says it is, before anything is built for a release.

python packaging/check_release.py v0.1.0
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

from distributions import ROOT, version


def objections(tag: str) -> list[str]:
    """Return why `tag` must not be released from this tree, a sentence each."""
    sentences = []
    if tag != f"v{version()}":
        sentences.append(
            f"the tag is {tag}, but mla/__init__.py has version {version()}: the tag must be v{version()}."
        )
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## \[{re.escape(version())}\] - \d{{4}}-\d\d-\d\d$", changes, re.MULTILINE):
        sentences.append(
            f"CHANGELOG.md has no line '## [{version()}] - YYYY-MM-DD': date the release's section."
        )
    return sentences


def main(arguments: Sequence[str] | None = None) -> int:
    """Print every objection; exit code 1 if there is one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tag", metavar="TAG", help="the tag to be released, v and the version")
    sentences = objections(parser.parse_args(arguments).tag)
    for sentence in sentences:
        print(f"error: {sentence}", file=sys.stderr)
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())
