"""Whatever was found wrong when its row was written is found today, by the same check."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from frozen_table import hold, kept
from wrong_in_play import FIXED, GROUPS, keys

SUPPORT = Path(__file__).parents[1] / "support"


def findings(group: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "wrong_in_play", group],
        env={**os.environ, "PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("group", GROUPS)
def test_none_was_dropped(group: str) -> None:
    names = keys(group)
    assert len(set(names)) == len(names)
    assert set(kept("wrong", group)) - set(names) == set()


@pytest.mark.parametrize("group", GROUPS)
def test_all_are_found(group: str) -> None:
    assert hold("wrong", group, findings(group)) == []


def test_every_check_finds_something_wrong() -> None:
    rows = [finding for group in GROUPS for finding in kept("wrong", group).values()]
    assert {finding.split()[1] for finding in rows if finding.startswith("fails ")} == FIXED


def test_every_row_names_what_finds_it() -> None:
    """An exit code that says that all is well is no finding."""
    rows = {key: finding for group in GROUPS for key, finding in kept("wrong", group).items()}
    assert len(rows) > 700
    assert [
        key for key, finding in rows.items() if not finding.startswith(("fails ", "exit 3", "exit 4"))
    ] == []
