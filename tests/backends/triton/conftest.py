"""Triton kernels are interpreted in processes of their own: one that does can no longer compile them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from outcome import Outcome, run_python
from triton_here import lacking

TESTS = Path(__file__).parents[2]
collect_ignore = ["inside"]  # for those processes only
collect_ignore_glob = ["test_*.py"] if lacking() else []

Interpret = Callable[..., Outcome]


@pytest.fixture
def interpret(tmp_path: Path) -> Interpret:
    """Return a function that runs Python with a Triton that interprets kernels."""

    def interpret(*words: str, folders: tuple[Path, ...] = (), **environment: str) -> Outcome:
        paths, chosen = (TESTS / "triton", *folders), {"TRITON_INTERPRET": "1", **environment}
        return run_python(*words, cwd=tmp_path, folders=paths, **chosen)

    return interpret
