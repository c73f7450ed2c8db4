"""Our seven distributions, built once for all tests that look at them."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def packaging_script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs a script of packaging/ in a process of its own."""

    def run(
        name: str, *arguments: object, root: Path = ROOT, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(root / "packaging" / name), *map(str, arguments)],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def dist(
    tmp_path_factory: pytest.TempPathFactory,
    worker_id: str,
    packaging_script: Callable[..., subprocess.CompletedProcess[str]],
) -> Path:
    """Return the folder with all sdists and wheels. One process builds, the others wait for it."""
    base = tmp_path_factory.getbasetemp()
    shared = (base if worker_id == "master" else base.parent) / "distributions"
    shared.mkdir(exist_ok=True)
    folder, done = shared / "dist", shared / "done"
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of another test process, which failed
            compiler = _hasty_compiler(shared / "compiler")
            built = packaging_script("build_all.py", "--no-isolation", folder, **compiler)
            assert built.returncode == 0, built.stderr
            done.touch()
    return folder


def _hasty_compiler(path: Path) -> dict[str, str]:
    """Return variables that choose the real compiler without optimisation, which takes long."""
    real = shutil.which(os.environ.get("CXX", "g++"))
    if real is None:
        return {}
    path.write_text(f'#!/bin/sh\nexec {real} "$@" -O0\n')
    path.chmod(0o755)
    return {"CXX": str(path)}
