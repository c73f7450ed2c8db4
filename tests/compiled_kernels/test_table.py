"""The committed table belongs to the kernels and tiles that are here."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.triton import fingerprint as module
from benchmarks.triton import problems
from benchmarks.triton.fingerprint import KERNELS, code, fingerprint
from benchmarks.triton.shipped import CURRENT, H100
from benchmarks.triton.table import TABLE, installed
from mla_backends.triton_ops import Tile

KINDS = ("latent: 16 heads", "merge", "expanded: causal", "rms_norm")


def test_the_table_is_of_these_kernels_and_tiles() -> None:
    stale = "table.md is of other kernels or tiles: see benchmarks/triton/README.md"
    assert f"`{fingerprint()}`" in TABLE.read_text(encoding="utf-8"), stale


def test_a_missing_version_is_named_with_its_cure(tmp_path: Path) -> None:
    for version in ("3.6.0", "3.8.0", "3.9.0"):
        (tmp_path / version / f"triton-{version}.dist-info").mkdir(parents=True)
    cure = f"has no Triton 3.1.0: run `pip install --no-deps --target {tmp_path / '3.1.0'} triton==3.1.0`"
    with pytest.raises(FileNotFoundError, match=re.escape(cure)):
        installed(tmp_path)
    (tmp_path / "3.1.0" / "triton-3.1.0.dist-info").mkdir(parents=True)
    assert installed(tmp_path)["3.1.0"] == tmp_path / "3.1.0"


@pytest.mark.parametrize(
    ("file", "changed"), [("latent.py", {"latent: 16 heads", "merge"}), ("shared.py", {*KINDS})]
)
def test_an_answer_depends_on_the_files_of_its_kernel(
    file: str, changed: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def numbers() -> dict[str, str]:
        return {name: module.fingerprint_of(cases[name]) for name in KINDS}

    cases = H100.cases()
    for path in KERNELS.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(module, "KERNELS", tmp_path)
    before = numbers()
    with (tmp_path / file).open("a", encoding="utf-8") as stream:
        stream.write("\nMORE = 1\n")
    after = numbers()
    assert {name for name in KINDS if after[name] != before[name]} == changed


def test_another_tile_is_another_number(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint()
    other = replace(H100, tuning=replace(H100.tuning, latent={1: Tile(16, 32, 4, 2)}))
    monkeypatch.setattr(module, "CURRENT", (*CURRENT[:-1], other))
    assert fingerprint() != before


def test_numbers_of_a_batch_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint()
    monkeypatch.setitem(problems.PROBLEMS, "latent: 128 heads", problems.decode(128, keys=(1700, 90, 80, 77)))
    assert fingerprint() == before
    monkeypatch.setitem(problems.PROBLEMS, "latent: 128 heads", problems.decode(64))
    assert fingerprint() != before


def test_comments_docstrings_and_lines_change_no_number(tmp_path: Path) -> None:
    first, second = tmp_path / "first.py", tmp_path / "second.py"
    first.write_text("def f(x, y):\n    return x + y\n")
    second.write_text(
        '# why\ndef f(x, y):  # of what\n    """Add.\n\n    Both.\n    """\n\n    return x + y\n'
    )
    assert code(first) == code(second)
    second.write_text("def f(x, y):\n    return x - y\n")
    assert code(first) != code(second)


def test_kernels_speak_the_language_of_triton_3_1() -> None:
    """Vendors' compilers do: no `a and b and c`, functions of Python, or pointers to a passed type."""
    nodes = [node for path in KERNELS.glob("*.py") for node in ast.walk(ast.parse(path.read_text("utf-8")))]
    kernels = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    conditions = [node for node in nodes if isinstance(node, ast.BoolOp)]
    calls = [node for kernel in kernels for node in ast.walk(kernel) if isinstance(node, ast.Call)]
    named = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
    pointed = [node.args[0] for node in calls if ast.unparse(node.func) == "tl.pointer_type"]
    assert conditions
    assert pointed
    assert not [ast.unparse(node) for node in conditions if len(node.values) > 2]
    assert not [ast.unparse(node) for node in pointed if not isinstance(node, ast.Attribute)]
    known = {"float", "range", "gdc_wait", "gdc_launch_dependents"}
    assert named <= {kernel.name for kernel in kernels} | known
