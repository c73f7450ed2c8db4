"""Real installations of the fake backends, and interpreters that see exactly those."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pluggy
import pytest

import mla_backends

Install = Callable[[str], Path]
Python = Callable[..., str]


@pytest.fixture(scope="session")
def contract_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with mla_backends and its one requirement, so that nothing else is in reach."""
    target = tmp_path_factory.mktemp("contract")
    for package in (mla_backends, pluggy):
        source = Path(str(package.__file__)).parent
        shutil.copytree(source, target / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    return target


@pytest.fixture
def python(tmp_path: Path, install: Install, contract_alone: Path) -> Python:
    """Return a function that runs code in a new interpreter and returns its stdout.

    The interpreter sees the named fakes and, unless `everything` is asked for, neither torch nor any
    backend that happens to be installed here.
    """

    def python(code: str, *fakes: str, everything: bool = False, **environment: str) -> str:
        outside = os.environ.get("PYTHONPATH", "") if everything else str(contract_alone)
        path = [*(str(install(fake)) for fake in fakes), *filter(None, [outside])]
        command = [sys.executable, *([] if everything else ["-S"]), "-c", code]
        result = subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path), **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return python
