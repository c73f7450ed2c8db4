"""A distribution as pip leaves it: what it brings, beside its name, version and entry points."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path


def install(
    source: Path, target: Path, name: str, version: str, group: str, entries: Mapping[str, str]
) -> None:
    """Copy what is in `source` to `target`, and write the metadata of the distribution `name` beside it."""
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    facts = target / f"{name.replace('-', '_')}-{version}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    points = "".join(f"{entry} = {value}\n" for entry, value in entries.items())
    (facts / "entry_points.txt").write_text(f"[{group}]\n{points}")
