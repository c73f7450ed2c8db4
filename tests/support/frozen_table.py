"""Tables of what was once seen. A replay is held against its table; recording adds rows and changes none."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "frozen"
RECORDS = "RECORD_FROZEN"


def same(kept: Any, seen: Any) -> bool:
    """Return whether both are equal."""
    return bool(kept == seen)


def kept(table: str, part: str) -> dict[str, Any]:
    """Return the rows of a part of a table; empty if there are none."""
    file = FOLDER / f"{table}.json"
    return dict(json.loads(file.read_text()).get(part, {})) if file.exists() else {}


def hold(
    table: str, part: str, seen: Mapping[str, Any], fits: Callable[[Any, Any], bool] = same
) -> list[str]:
    """Return how what is seen differs from a part of a table, one line a row.

    With RECORD_FROZEN=1 rows that are new are added to the table. What it has is never changed nor left out:
    whoever wants that edits the table, where a reader of the change sees it.
    """
    rows = kept(table, part)
    lost = [f"{key}: gone, was {row}" for key, row in rows.items() if key not in seen]
    changed = [
        f"{key}: {seen[key]}, was {row}"
        for key, row in rows.items()
        if key in seen and not fits(row, seen[key])
    ]
    new = {key: row for key, row in seen.items() if key not in rows}
    if new and os.environ.get(RECORDS):
        _add(FOLDER / f"{table}.json", part, {**rows, **new})
        new = {}
    return [
        *lost,
        *changed,
        *(f"{key}: {row} has no row yet; {RECORDS}=1 adds it" for key, row in new.items()),
    ]


def _add(file: Path, part: str, rows: Mapping[str, Any]) -> None:
    parts = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(_text({**parts, part: rows}))


def _text(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """Return JSON with one line a row."""
    blocks = []
    for part, rows in sorted(parts.items()):
        lines = [f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in sorted(rows.items())]
        blocks.append(f" {json.dumps(part)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"
