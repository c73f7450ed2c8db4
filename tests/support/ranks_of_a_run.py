"""What tests of runs over several ranks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
