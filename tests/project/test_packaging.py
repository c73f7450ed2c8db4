"""Rules between the packages: who imports whom, and what an import costs."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mla
import mla_backends
from mla_backends.known import KNOWN, WITHOUT_PLUGIN, KnownBackend, KnownDevice

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("layer", "config", "cache", "reference", "checkpoint", "cost", "verify", "support")
PLUGINS = sorted((ROOT / "plugins").glob("*/mla_backend_*"))


def python_files(*folders: Path) -> list[Path]:
    files = sorted(path for folder in folders for path in folder.rglob("*.py"))
    assert files, f"no Python file under {folders}"
    return files


def imports(path: Path, *, run_time: bool) -> Iterator[str]:
    """Yield the top-level package of every import; at run time those under TYPE_CHECKING do not count."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").partition(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (str(a.value).partition(".")[0] for a in node.args[:1] if isinstance(a, ast.Constant))
        if run_time and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            pending += node.orelse
        else:
            pending += ast.iter_child_nodes(node)


def test_the_scan_sees_every_way_to_import(tmp_path: Path) -> None:
    source = tmp_path / "sample.py"
    source.write_text(
        "from typing import TYPE_CHECKING\nimport a.b, c\nfrom d.e import f\nfrom . import g\n"
        "if TYPE_CHECKING:\n    import h\nelse:\n    import i\n"
        "def late():\n    import j\n    importlib.import_module('k.l')\n"
    )
    assert set(imports(source, run_time=True)) == {"typing", "a", "c", "d", "i", "j", "k"}
    assert set(imports(source, run_time=False)) - set(imports(source, run_time=True)) == {"h"}


@pytest.mark.parametrize(
    ("folder", "forbidden", "run_time"),
    [
        *((plugin, "mla$", True) for plugin in PLUGINS),  # annotations may
        (ROOT / "backends" / "mla_backends", "mla$|mla_backend_", False),
        (ROOT / "mla", "mla_backend_", False),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else "",
)
def test_packages_import_one_way(folder: Path, forbidden: str, run_time: bool) -> None:
    for path in python_files(folder):
        assert not [name for name in imports(path, run_time=run_time) if re.match(forbidden, name)], path


def test_the_core_and_its_tests_never_name_a_vendor() -> None:
    entries: list[KnownBackend | KnownDevice] = [*KNOWN.values(), *WITHOUT_PLUGIN.values()]
    names = {word for entry in entries for word in (entry.name, *entry.also)}
    names -= {"cpu", "cuda", "ascend"}  # the last is an English word as well
    assert len(names) >= 12
    vendor = re.compile(rf"(?<![a-z])({'|'.join(sorted(names))})(?![a-z])", re.IGNORECASE)
    for path in python_files(ROOT / "mla", *(ROOT / "tests" / room for room in ROOMS)):
        assert not vendor.findall(path.read_text(encoding="utf-8")), path


def run_python(
    code: str, cwd: Path, *arguments: str, path: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run an interpreter away from the checkout, which finds the packages where this one found them."""
    folders = {str(Path(package.__file__ or "").resolve().parents[1]) for package in (mla, mla_backends)}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*([path] if path else []), *sorted(folders)])}
    command = [sys.executable, *(["-c", code] if code else []), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("package", ["mla", "mla_backends", "mla.config", "mla.cost", "mla.errors"])
def test_importing_does_not_import_torch(tmp_path: Path, package: str) -> None:
    result = run_python(f"import sys, {package}; print('torch' in sys.modules)", tmp_path)
    assert result.stdout == "False\n", result.stderr


def test_every_public_name_of_the_core_can_be_had() -> None:
    for name in mla.__all__:
        assert getattr(mla, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = mla.nothing


def test_a_mixture_of_installed_and_checked_out_packages_aborts_the_tests(tmp_path: Path) -> None:
    """Put a copy of the contract where pip would put it, and the core on the path from where it is now."""
    elsewhere = tmp_path / ("lib" if "site-packages" in str(mla.__file__) else "site-packages")
    assert mla_backends.__file__
    shutil.copytree(Path(mla_backends.__file__).parent, elsewhere / "mla_backends")
    config = ("-c", str(ROOT / "pyproject.toml"), "--collect-only", "-p", "no:cacheprovider")
    tests = str(Path(__file__).parent)
    result = run_python("", tmp_path, "-m", "pytest", *config, tests, path=str(elsewhere))
    assert result.returncode == 4
    assert "the packages under test must all come from" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
