"""Triton kernels are interpreted in processes of their own: one that does can no longer compile them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from outcome import Outcome
from triton_here import lacking

TESTS = Path(__file__).parents[2]
collect_ignore = ["inside"]  # for those processes only
collect_ignore_glob = ["test_*.py"] if lacking() else []

Interpret = Callable[..., Outcome]


@pytest.fixture
def interpret(tmp_path: Path) -> Interpret:
    """Return a function that runs Python with a Triton that interprets kernels."""

    def interpret(*words: str, folders: tuple[Path, ...] = (), **environment: str) -> Outcome:
        paths = [str(TESTS / "triton"), *map(str, folders), os.environ.get("PYTHONPATH", "")]
        done = subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                "TRITON_INTERPRET": "1",
                "OMP_NUM_THREADS": "1",
                **environment,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return interpret
