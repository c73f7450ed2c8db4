"""Pictures for light and dark surroundings follow the theme that a reader has chosen on the site."""

from __future__ import annotations

import re

_PICTURE = re.compile(
    r'<picture>\s*<source media="\(prefers-color-scheme: dark\)" srcset="(?P<dark>[^"]+)">\s*'
    r'<img (?P<before>[^>]*)src="(?P<light>[^"]+)"(?P<after>[^>]*)>\s*</picture>'
)
_BOTH = (
    r'<div><img \g<before>src="\g<light>#only-light"\g<after>>'
    r'<img \g<before>src="\g<dark>#only-dark"\g<after>></div>'
)


def for_both_themes(markdown: str) -> str:
    """Return a page whose `<picture>`s, which follow the system, are images by the theme's own conditions."""
    return _PICTURE.sub(_BOTH, markdown)
