"""Runs over several ranks: real processes, forked from one that has imported what a rank needs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks_of_a_run import Start, start_ranks
from tiny_run import write_tiny_run

from benchmarks.ranks import processes

__all__ = ["start_ranks"]


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
