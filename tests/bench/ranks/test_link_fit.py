"""The link between real processes is measured, the same for all of them.

Their clocks are scripted: any collective takes one second on rank 0, two on rank 1 and three on rank 2.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

RANK = """
import itertools, json, sys
import torch
import torch.distributed as dist
from mla.bench.ranks import link_fit
from mla.parallel.groups import Groups
from mla.parallel.layout import Layout

folder, rank = sys.argv[1], int(sys.argv[2])
readings = itertools.count(step=(1 + rank) * 10**9)
link_fit.now_ns = lambda: next(readings)
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
found = link_fit.measured(Groups(Layout(dcp=3)), torch.device("cpu"), lambda: None)
alone = link_fit.measured(Groups(Layout(dp=3)), torch.device("cpu"), lambda: None)
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump([{kind: str(line) for kind, line in found.items()}, len(alone)], file)
dist.destroy_process_group()
"""


def test_every_kind_of_collective_is_measured_alike_on_all_ranks(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANK, str(tmp_path)]
    started = [subprocess.Popen([*command, str(rank)]) for rank in range(3)]
    try:
        assert [process.wait(timeout=120) for process in started] == [0, 0, 0]
    finally:
        for process in started:
            process.kill()
            process.wait()
    first, *others = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    lines, alone = first
    assert lines == {  # the slowest counts; a ring of 3 has 2 steps, and an all-reduce twice as many
        "all-reduce": "alpha=750000us,beta=infGB/s",
        "all-gather": "alpha=1.5e+06us,beta=infGB/s",
        "all-to-all": "alpha=1.5e+06us,beta=infGB/s",
    }
    assert alone == 0  # parts of dp have nothing to say to each other
    assert others == [first, first]
