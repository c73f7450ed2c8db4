"""The documentation as a site: built once, by the command that continuous integration runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "docs" / "site"))  # the hooks, which MkDocs finds by their path

Build = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def build() -> Build:
    """Return a function that builds a checkout's site into a folder, as on a machine of no forge."""

    def build(root: Path, to: Path) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
        for name in [name for name in environment if name.startswith(("GITHUB_", "SITE_"))]:
            del environment[name]
        config = str(root / "docs" / "site" / "mkdocs.yml")
        return subprocess.run(
            [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", config, "-d", str(to)],
            cwd=to.parent,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return build


@pytest.fixture(scope="session")
def site(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the built site."""
    folder = tmp_path_factory.mktemp("built") / "site"
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder
