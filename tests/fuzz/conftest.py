"""Fuzzers: the same few examples in every run, and as many others as you like by hand.

FUZZ_EXAMPLES=20000 pytest tests/fuzz -n2 [--hypothesis-seed 7]
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

_BY_HAND = os.environ.get("FUZZ_EXAMPLES")

settings.register_profile(
    "fuzz",
    max_examples=int(_BY_HAND or 50),
    derandomize=not _BY_HAND,
    deadline=None,  # tests assert no times
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work where names are short: a sentence that is judged may hold one."""
    monkeypatch.chdir(tmp_path)
