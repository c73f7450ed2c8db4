"""Whole outputs, kept in `tests/golden`: a change of one shows in the diff of its file."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "golden"


def hold(name: str, text: str) -> None:
    """Assert that `text` is what the file `name` keeps; with UPDATE_GOLDEN=1, keep it instead."""
    path = FOLDER / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), f"UPDATE_GOLDEN=1 keeps the new {name}"
