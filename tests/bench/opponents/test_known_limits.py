"""What no check here can see is written down, with what a reader can do about it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def section() -> str:
    """Return the section of the method's page, on one line."""
    page = (ROOT / "benchmarks" / "README.md").read_text()
    (limits,) = re.findall(r"^## Known limits\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return " ".join(str(limits).split())


@pytest.mark.parametrize(
    "said",
    ["A plugin is trusted code", "in the same process", "read the plugin", "python -m mla.conformance"],
)
def test_the_methods_page_says(section: str, said: str) -> None:
    assert said in section
