"""What tests of runs over several ranks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Start = Callable[..., Any]  # of words: the ranks of a run, as `benchmarks.ranks.nursery.Ranks`
BOUND = 60.0  # seconds: far more than any run here takes
