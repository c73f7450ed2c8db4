"""The gate's script, run with a pip and a pytest that only write down how they were called."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
# `python3 -m venv FOLDER`, whose programs fail where their command line holds $FAIL.
PYTHON3 = """#!/bin/sh
mkdir "$3/bin"
echo 'export PATH="'"$3/bin"':$PATH"' > "$3/bin/activate"
for name in pip pytest ruff mypy; do
    echo '#!/bin/sh' > "$3/bin/$name"
    echo 'echo "$(basename "$0") $*" >> "$LOG"; case "$0 $*" in *"$FAIL"*) exit 3;; esac' >> "$3/bin/$name"
    chmod +x "$3/bin/$name"
done
"""
Gate = Callable[..., tuple[int, list[str]]]


def oldest() -> str:
    """Return the oldest release of `transformers` that pip accepts."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (requirement,) = project["optional-dependencies"]["transformers"]
    return str(requirement.removeprefix("transformers>="))


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    """Return a function that runs the script, and returns its exit code and what it called."""
    root, programs, log = tmp_path / "root", tmp_path / "programs", tmp_path / "log"
    (root / ".ci").mkdir(parents=True)
    programs.mkdir()
    shutil.copy(ROOT / ".ci" / "run", root / ".ci")
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    (programs / "python3").write_text(PYTHON3)
    (programs / "python3").chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"

    def run(*tests: str, fail: str = "nothing", **variables: str) -> tuple[int, list[str]]:
        log.write_text("")
        known = {"PATH": path, "LOG": str(log), "FAIL": fail, "CHROME": "/a/browser", "TMPDIR": str(tmp_path)}
        command = [str(root / ".ci" / "run"), *tests]
        done = subprocess.run(command, env={**known, **variables}, capture_output=True, text=True, timeout=60)
        return done.returncode, log.read_text().splitlines()

    return run


def readme_command() -> list[str]:
    (command,) = re.findall(r"^(pip install .*) && pytest$", (ROOT / "README.md").read_text("utf-8"), re.M)
    return [command.replace("'", "")]


LINTERS = ["ruff check --no-cache .", "ruff format --no-cache --check .", "mypy "]
TIERS = ["pytest ", "pytest -m rest"]


def test_linters_both_tiers_and_then_the_oldest_transformers(gate: Gate) -> None:
    serving = "pytest tests/integrations"
    again = [f"pip install transformers=={oldest()}", serving]
    assert gate() == (0, [*readme_command(), *LINTERS, *TIERS, *again])
    words = "--index-url https://a/b?c&d torch>=2.6,<3"
    before = [f"pip install {word}" for word in (words, again[0].split()[-1])]
    code, calls = gate(INSTALL_FIRST=words, TRANSFORMERS="oldest")
    assert (code, calls) == (0, [*before, *readme_command(), *LINTERS, *TIERS]), "what is there stays"
    assert LINTERS[-1] not in gate(INSTALL_FIRST="torch==2.4.*")[1]


def test_tests_that_are_named_are_all_that_runs(gate: Gate) -> None:
    assert gate("tests/a", "-k", "b  c") == (0, [*readme_command(), "pytest tests/a -k b  c"])


@pytest.mark.parametrize(
    "at",
    ["pip install .[", "ruff check", "bin/mypy", "bin/pytest ", "-m rest", "transformers==", "tests/int"],
)
def test_whatever_fails_ends_it(gate: Gate, at: str) -> None:
    code, calls = gate(fail=at)
    assert code == 3
    assert at.removeprefix("bin/") in calls[-1]


def test_a_release_that_it_does_not_know_is_a_mistake(gate: Gate) -> None:
    assert gate(TRANSFORMERS="5.21") == (2, [])
