"""The repository stays small: lines of Python by part, and the size of a file and of a function."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_LINES, MOST_FUNCTION_LINES = 600, 60
KERNELS = "backends/mla_backends/triton_ops/jit"  # one function each: calls slow the interpreter
# Lines of Python, as `wc -l` counts them. Lower a number when its part shrinks. Raise one only with a reason
# in the commit body.
PRODUCT, TESTS, BENCHMARKS = 43_562, 59_222, 6_992


def sources(*tops: str) -> list[Path]:
    """Return the Python files of the product below these folders."""
    return [path for top in tops for path in sorted((ROOT / top).rglob("*.py")) if "build" not in path.parts]


@pytest.mark.parametrize(
    ("tops", "most"),
    [(("mla", "backends", "plugins"), PRODUCT), (("tests",), TESTS), (("benchmarks",), BENCHMARKS)],
    ids=["product", "tests", "benchmarks"],
)
def test_each_part_keeps_its_budget(tops: tuple[str, ...], most: int) -> None:
    files = [path for path in sources(*tops) if tops == ("tests",) or "tests" not in path.parts]
    assert sum(path.read_bytes().count(b"\n") for path in files) <= most


@pytest.mark.parametrize("top", ["mla", "backends", "plugins", "benchmarks", "packaging"])
def test_files_and_functions_stay_short(top: str) -> None:
    large = []
    for path in sources(top):
        text, name = path.read_text(), str(path.relative_to(ROOT))
        if text.count("\n") > MOST_LINES:
            large.append(name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not name.startswith(KERNELS):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                large += [f"{name}: {node.name}"] * (lines > MOST_FUNCTION_LINES)
    assert not large
