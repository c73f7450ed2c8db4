"""Command lines end as they did, and write what has the same shape: keys, columns, labels and types."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from commands_in_play import shape
from frozen_table import FOLDER, hold

SUPPORT = FOLDER.parent / "support"


def fits(kept: Any, seen: Any) -> bool:
    """Return whether a shape is the one that was kept: null and what is empty may be anything."""
    if kept is None or seen is None:
        return True
    if isinstance(kept, dict) and isinstance(seen, dict):
        return set(kept) == set(seen) and all(fits(kept[key], seen[key]) for key in kept)
    return bool(kept == seen)


def test_commands_do_what_they_did(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "commands_in_play", str(FOLDER / "commands.txt")],
        env={**os.environ, "PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert len(seen) >= 60
    assert hold("commands", "commands", seen, fits) == []


def test_a_shape_has_keys_and_types() -> None:
    outline = shape({"a": [{"b": 1}, {"b": None, "c": "x"}], "d": [], "environment": {"torch": "2"}})
    assert outline == {
        "a": {"[]": {"b": "number", "c": "text"}},
        "d": {"[]": None},
        "environment": "map",
    }
    assert fits(outline, {**outline, "d": {"[]": {"e": "text"}}})
    assert not fits(outline, {**outline, "e": None}), "a new key"
    assert not fits(outline, {**outline, "a": {"[]": {"b": "text", "c": "text"}}})
