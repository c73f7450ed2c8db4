"""`pytest` runs one tier of tests, `pytest -m rest` the other; what is named runs whichever it is in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiers

ROOT = Path(__file__).resolve().parents[2]
CONFTEST = """
import tiers
from tiers import pytest_collection_modifyitems

tiers.REST = {"slow": ("takes long", ("test_both.py",))}
tiers.EVERYDAY = ("test_both.py::test_path",)

def pytest_configure(config):
    tiers.choose(config)

def pytest_report_header(config):
    return tiers.header(config)
"""
SUITE = {
    "conftest.py": CONFTEST,
    "pytest.ini": "[pytest]\ntestpaths = .\naddopts = --strict-markers -p no:cacheprovider",
    "test_both.py": "def test_path(): pass\ndef test_all(): pass",
    "test_quick.py": "def test_quick(): pass",
}
Suite = Callable[..., tuple[list[str], str]]


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    """Return a function that runs a small suite, and returns what passed, and all that was printed."""
    for name, text in SUITE.items():
        (tmp_path / name).write_text(text)

    def run(*words: str) -> tuple[list[str], str]:
        command = [sys.executable, "-m", "pytest", "-v", *words]
        known = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "support"), "PYTEST_ADDOPTS": ""}
        done = subprocess.run(command, cwd=tmp_path, env=known, capture_output=True, text=True, check=True)
        passed = [line.split("::")[1].split()[0] for line in done.stdout.splitlines() if "PASSED" in line]
        return passed, done.stdout

    return run


def test_each_test_is_in_one_tier(suite: Suite) -> None:
    everyday, said = suite()
    assert everyday == ["test_path", "test_quick"]
    assert "`pytest -m rest` runs the rest" in said
    assert "1 deselected" in said
    rest, said = suite("-m", "rest")
    assert rest == ["test_all"]
    assert "tier:" not in said


@pytest.mark.parametrize("words", [("test_both.py",), ("-k", "both"), ("-m", "slow or not slow")])
def test_what_is_selected_runs_whichever_tier_it_is_in(suite: Suite, words: tuple[str, ...]) -> None:
    assert "test_all" in suite(*words)[0]


def test_workers_leave_out_the_same(suite: Suite) -> None:
    said = suite("-n1")[1]
    assert "PASSED" in said
    assert "test_all" not in said


def test_markers_say_why(suite: Suite) -> None:
    assert "@pytest.mark.slow: takes long" in suite("--markers")[1]


def test_no_pattern_is_stale() -> None:
    """Each pattern is the beginning of a test that is here; everybody runs something of each kind."""
    here = [
        f"{file.relative_to(ROOT)}::{name}"
        for top in ("tests", "plugins")
        for file in (ROOT / top).rglob("test_*.py")
        for name in re.findall(r"^ *def (test_\w+)", file.read_text("utf-8"), re.MULTILINE)
    ]
    every = [*tiers.EVERYDAY, *(pattern for _, patterns in tiers.REST.values() for pattern in patterns)]
    unused = [
        pattern for pattern in every if not any(re.match(pattern.partition("\\[")[0], name) for name in here)
    ]
    assert unused == []
    for marker, (_, patterns) in tiers.REST.items():
        every = [name for name in here if any(re.match(pattern, name) for pattern in patterns)]
        kept = [
            name
            for name in every
            for pattern in tiers.EVERYDAY
            if re.match(pattern.partition("\\[")[0], name)
        ]
        assert kept, f"everybody leaves out all of {marker}"
