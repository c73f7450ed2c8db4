"""The linter and the type checker are part of the suite: one green command is enough."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("plugins/*/mla_backend_*"))
TYPED = tuple(map(int, version("torch").split(".")[:2])) >= (2, 6)
CHECKED = ("mla", "backends/mla_backends", *PLUGINS, "benchmarks", "packaging")


@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "check", "--no-cache", "."),
        ("ruff", "format", "--no-cache", "--check", "."),
        pytest.param(
            ("mypy", "--cache-dir", "{tmp}", *CHECKED),
            marks=pytest.mark.skipif(not TYPED, reason="torch before 2.6 exports less to type checkers"),
        ),
    ],
    ids=["lint", "format", "types"],
)
def test_the_tree_is_clean(command: tuple[str, ...], tmp_path: Path) -> None:
    words = [word.format(tmp=tmp_path) for word in command]
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
