"""The rooms of the house: imports between them run one way, and none is crowded."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_FILES = 16

# Room -> rooms that it imports from. What is in no room, such as `mla.errors` and `mla.text`, is free to all.
ARROWS: dict[str, set[str]] = {}
FREE = {"mla", "mla.backend", "mla.errors", "mla.text", "mla.weights"}


def rooms_of(module: str) -> str | None:
    """Return the room a module is in: a folder of mla, or of mla/bench; None where everybody may go."""
    if module in FREE or not module.startswith("mla."):
        return None
    parts = module.split(".")
    return ".".join(parts[1:3]) if parts[1] == "bench" and len(parts) > 2 else parts[1]


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def imports(path: Path) -> Iterator[str]:
    """Yield every module that a file imports, at its top, in functions and for types alike."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if is_module(inner) else node.module


def arrows() -> dict[str, set[str]]:
    """Return room -> rooms that its files import from."""
    drawn: dict[str, set[str]] = {}
    for path in (ROOT / "mla").rglob("*.py"):
        room = rooms_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        if room is None:
            continue
        targets = {rooms_of(module) for module in imports(path)}
        drawn.setdefault(room, set()).update(target for target in targets if target not in (None, room))
    return {room: targets for room, targets in drawn.items() if targets}


def test_rooms_import_from_each_other_as_the_table_says() -> None:
    assert arrows() == ARROWS


def test_the_table_has_no_circle() -> None:
    TopologicalSorter(ARROWS).prepare()  # raises CycleError


@pytest.mark.parametrize("package", ["mla", "backends", "plugins"])
def test_no_folder_of_the_product_is_crowded(package: str) -> None:
    folders = {path.parent for path in (ROOT / package).rglob("*.py") if "tests" not in path.parts}
    crowded = {
        str(folder.relative_to(ROOT)): count
        for folder in folders
        if (count := len(list(folder.glob("*.py")))) > MOST_FILES
    }
    assert not crowded
