"""What tests of runs over several ranks share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Last on the path: the checkout must not shadow packages that are installed.
sys.path.append(str(ROOT))

from benchmarks.ranks import processes  # noqa: E402

Start = Callable[..., Any]  # of words: the ranks of a run, as `benchmarks.ranks.processes.Ranks`
BOUND = 120.0  # seconds: far more than any run here takes, also beside other work
FAULTY = "rank_faults:FaultyRank"
# Seconds after which a rank that shows no sign of life is missed, and after which one that waits is ended.
SILENT, GRACE = 3.0, 1.0
IMPATIENT = {
    "mla.bench.ranks.pulse.SILENT": SILENT,
    "mla.bench.ranks.pulse.GRACE": GRACE,
    "mla.bench.ranks.launch.SILENT": SILENT,
}


@pytest.fixture(scope="session")
def start_ranks() -> Start:
    """Return `processes.start`, once what ranks are forked from runs."""
    processes.prepare([ROOT / "tests" / "support"])
    return processes.start
