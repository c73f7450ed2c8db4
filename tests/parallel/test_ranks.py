"""Every layout equals one device: real processes, which talk through gloo, against the float64 oracle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks_of_a_run import BOUND as TIMEOUT_S
from ranks_of_a_run import Start

# Per token; 5e-7 and 1.2e-2 were measured.
BOUND = {"float32": 1e-5, "bfloat16": 2e-2}


@pytest.mark.parametrize("world", [2, 4])
def test_every_layout_equals_one_device(start_ranks: Start, world: int, tmp_path: Path) -> None:
    """One start of the processes runs all cases: starting takes longer than they do."""
    ranks = start_ranks([], tmp_path, world, program="layer_of_a_rank:main")
    codes = ranks.wait(2 * TIMEOUT_S)
    ranks.end()
    assert codes == [0] * world, [ranks.err(rank) for rank in range(world)]
    for rank in range(world):
        errors = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(errors) >= 30
        wrong = {case: error for case, error in errors.items() if not right(case, error)}
        assert wrong == {}


def right(case: str, error: float | str) -> bool:
    """Return whether a case ended with a small error; a text is what it raised."""
    return isinstance(error, float) and error <= BOUND["bfloat16" if "bfloat16" in case else "float32"]
