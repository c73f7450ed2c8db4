"""Two tiers: what `pytest` runs before a commit, and the rest, which `.ci/run` adds.

What belongs to the rest has a marker that says why (`pytest -m levels` runs one kind). What is named on pytest's
command line, or selected by -m or -k, runs whichever tier it is in.
"""

from __future__ import annotations

import re

import pytest

# Marker -> (why, patterns of node ids).
REST: dict[str, tuple[str, tuple[str, ...]]] = {}
# One real path through each of those rooms stays in the tier of everybody.
EVERYDAY: tuple[str, ...] = ()


def marker_of(nodeid: str) -> str | None:
    """Return the marker that puts a test into the rest; None for one that everybody runs."""
    if any(re.match(pattern, nodeid) for pattern in EVERYDAY):
        return None
    for marker, (_, patterns) in REST.items():
        if any(re.match(pattern, nodeid) for pattern in patterns):
            return marker
    return None


def choose(config: pytest.Config) -> None:
    """Register the markers, and leave the rest out unless the command line selects tests."""
    config.addinivalue_line("markers", "rest: left to .ci/run; the union of the markers below")
    for marker, (why, _) in REST.items():
        config.addinivalue_line("markers", f"{marker}: {why}")
    named = config.args_source is pytest.Config.ArgsSource.ARGS
    if not (named or config.option.markexpr or config.option.keyword):
        config.option.markexpr = "not rest"


@pytest.hookimpl(tryfirst=True)  # before pytest looks at -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give tests of the rest their markers."""
    for item in items:
        if marker := marker_of(item.nodeid):
            item.add_marker(marker)
            item.add_marker("rest")


def header(config: pytest.Config) -> str | None:
    """Say which tests are left out."""
    if config.option.markexpr == "not rest":
        return "tier: before a commit; `pytest -m rest` runs the rest, as .ci/run does (`pytest --markers`)"
    return None
