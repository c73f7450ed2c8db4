"""What other tests find wrong by their own means: no case is dropped, and no assertion is weakened.

Opponents that cheat, mutants of Triton kernels, wrong layers and wrong arithmetic are played by the tests
named here: running them is the replay. Rows are read off their source: what each test asserts, and its cases.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from frozen_table import hold

ROOT = Path(__file__).resolve().parents[2]
# Tests and helpers that say what is found, by where they are.
READ = (
    *("tests/bench/opponents", "tests/layer/test_mutations.py", "tests/verify/test_right_forms.py"),
    *("tests/verify/test_tolerances.py", "tests/verify/test_poison.py"),
    *("tests/conformance/test_sequences.py", "tests/conformance/test_reach.py"),
    "tests/conformance/test_right_backends.py",
    *(f"tests/bench/ranks/test_{name}.py" for name in ("doubts", "refusals", "shares", "link_fit")),
)
INTERPRETED = "tests/backends/triton/inside/check_mutations.py"  # which only an interpreter can import
JUDGES = ("lost", "number_or_percentage_lost", "stands", "caught", "failed", "failures")  # of findings


def statements(path: Path) -> dict[str, list[str]]:
    """Return what each test of a file asserts, and what its functions return that judge findings."""
    tree = ast.parse(path.read_text())
    said = {}
    for node in (definition for definition in ast.walk(tree) if isinstance(definition, ast.FunctionDef)):
        if node.name.startswith("test_"):
            inside = (
                statement for statement in ast.walk(node) if isinstance(statement, (ast.Assert, ast.With))
            )
            said[node.name] = [
                ast.unparse(statement if isinstance(statement, ast.Assert) else statement.items[0])
                for statement in inside
                if isinstance(statement, ast.Assert) or "raises" in ast.unparse(statement.items[0])
            ]
        elif node.name in JUDGES:
            said[node.name] = [
                ast.unparse(returned) for returned in ast.walk(node) if isinstance(returned, ast.Return)
            ]
    return said


def collected() -> dict[str, list[str]]:
    """Return the cases that pytest collects: file and test -> what stands in brackets."""
    words = ("--collect-only", "-q", "-n0", "-p", "no:cacheprovider", *READ)
    done = subprocess.run(
        # -I: the checkout must not come before what is installed.
        [sys.executable, "-I", "-m", "pytest", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cases = defaultdict(list)
    for line in (line for line in done.stdout.splitlines() if "::" in line):
        test, _, case = line.partition("[")
        cases[test].append(case.removesuffix("]"))
    return cases


def test_no_case_is_dropped() -> None:
    """Cases that come on top are no loss."""
    seen = {test: sorted(cases) for test, cases in collected().items()}
    assert hold("statements", "cases", seen, lambda kept, seen: set(kept) <= set(seen)) == []


def test_no_assertion_is_weakened() -> None:
    files = [
        file for name in (*READ, INTERPRETED) for file in sorted((ROOT / name).rglob("*.py")) or [ROOT / name]
    ]
    seen = {
        f"{file.relative_to(ROOT)}::{name}": said for file in files for name, said in statements(file).items()
    }
    assert hold("statements", "assertions", seen, alike) == []


def alike(kept: list[str], seen: list[str]) -> bool:
    """Return whether statements are the same: each Python writes the parentheses of some in its own way."""

    def parsed(text: str) -> str:
        return ast.dump(ast.parse(f"with {text}: pass" if "raises" in text.partition("(")[0] else text))

    return [*map(parsed, kept)] == [*map(parsed, seen)]


def test_no_mutant_of_a_kernel_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is found by the problems of its group in `check_mutations.py`, in Triton's interpreter."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "triton")
    import mutants

    seen = {
        f"{mutant.room}: {mutant.name}": {"old": mutant.old, "new": mutant.new, "problems of": group}
        for group in mutants.__all__
        for mutant in getattr(mutants, group)
    }
    assert hold("statements", "kernels", seen) == []


def test_every_mutant_of_a_kernel_is_played_against_its_problems() -> None:
    tree = ast.parse((ROOT / INTERPRETED).read_text())
    (played,) = (
        statement for statement in tree.body if isinstance(statement, ast.AnnAssign) and statement.value
    )
    assert (
        hold("statements", "kernel problems", {ast.unparse(played.target): ast.unparse(played.value)}) == []
    )
