"""The rooms of the house: imports between them run one way."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# The floors of the house, the lowest first: a room imports only from floors below its own.
FLOORS = (
    {"config"},
    {"cache", "checkpoint", "cost"},
    {"reference", "bench.workload"},
    {"layer"},
    {"command", "integrations", "parallel", "verify"},
    {"cases"},
    {"failures"},
    {"conformance", "bench.results", "bench.doctor", "bench.scaffold"},
    {"bench.terminal", "bench.subjects"},
    {"bench.limits", "bench.report"},
    {"bench.measure"},
    {"bench.plan"},
    {"bench.ranks"},
    {"bench.run"},
    {"bench.cli"},
    {"bench.__main__"},
)
# Modules on no floor, free to all.
FREE = {"mla", "mla.__init__", "mla.backend", "mla.errors", "mla.text", "mla.weights"}


def room_of(module: str) -> str | None:
    """Return the room of a module: a folder of mla or of mla/bench; None if it is free to all."""
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


def arrows() -> Iterator[tuple[str, str, str]]:
    """Yield file, its room, and another room that it imports from."""
    for path in sorted((ROOT / "mla").rglob("*.py")):
        file = path.relative_to(ROOT)
        room = room_of(".".join(file.with_suffix("").parts))
        for target in {room_of(module) for module in imports(path)} if room else ():
            if target not in (None, room):
                yield str(file), str(room), str(target)


def floor(room: str) -> int:
    return next(floor for floor, rooms in enumerate(FLOORS) if room in rooms)


def test_imports_go_down() -> None:
    drawn = list(arrows())
    assert len(drawn) > 200, "the imports were not found"
    assert [arrow for arrow in drawn if floor(arrow[2]) >= floor(arrow[1])] == []


def test_the_benchmark_does_not_lean_on_conformance() -> None:
    assert [arrow for arrow in arrows() if arrow[1].startswith("bench") and arrow[2] == "conformance"] == []


def test_asynchronous_copies_have_one_home() -> None:
    """Elsewhere host memory could be gone, or other numbers in it, before the device has read it."""
    product = ("mla", "backends", "plugins", "benchmarks")
    files = [
        path for package in product for path in (ROOT / package).rglob("*.py") if "tests" not in path.parts
    ]
    using = {str(path.relative_to(ROOT)) for path in files if "non_blocking" in path.read_text()}
    assert using == {"backends/mla_backends/upload.py"}
