"""The link between real processes is measured, the same for all of them, and by the slowest."""

from __future__ import annotations

import json
from pathlib import Path

from ranks_of_a_run import BOUND, Start


def test_every_kind_of_collective_is_measured_alike_on_all_ranks(start_ranks: Start, tmp_path: Path) -> None:
    ranks = start_ranks([], tmp_path, world=3, program="link_of_a_rank:main")
    assert ranks.wait(BOUND) == [0, 0, 0], ranks.err()
    first, *others = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    lines, alone = first
    assert lines == {  # a ring of 3 has 2 steps, and an all-reduce twice as many
        "all-reduce": "alpha=750000us,beta=infGB/s",
        "all-gather": "alpha=1.5e+06us,beta=infGB/s",
        "all-to-all": "alpha=1.5e+06us,beta=infGB/s",
    }
    assert alone == 0  # parts of dp have nothing to say to each other
    assert others == [first, first]
