"""Runs over several ranks: real processes, forked from one that has imported what a rank needs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks_of_a_run import Start
from tiny_run import write_tiny_run

ROOT = Path(__file__).resolve().parents[3]
# Last on the path: the checkout must not shadow packages that are installed.
sys.path.append(str(ROOT))

from benchmarks.ranks import processes  # noqa: E402


@pytest.fixture(scope="session")
def start_ranks() -> Start:
    """Return `processes.start`, once what ranks are forked from runs."""
    processes.prepare([ROOT / "tests" / "support"])
    return processes.start


@pytest.fixture
def start(start_ranks: Start, tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts the ranks of a run of a tiny layer, two by default, with more words."""
    common = write_tiny_run(tmp_path, passes=2, prefill_runs=2, decode_runs=3)
    started: list[processes.Ranks] = []

    def start(*words: str, backend: str = "cpu", world: int = 2, **more: object) -> processes.Ranks:
        given = ["--backend", backend, *common, "--dtype", "float32", "--implementations", "mla", *words]
        started.append(start_ranks(given, tmp_path, world, **more))
        return started[-1]

    yield start
    for ranks in started:
        ranks.end()
