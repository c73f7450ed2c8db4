"""A rank that measures the link, with a scripted clock: any collective takes 1 + RANK seconds."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from mla.bench.ranks import crew
from mla.parallel.groups import Groups
from mla.parallel.layout import Layout


def main(words: Sequence[str]) -> int:
    """Measure among all ranks and, as parts of `dp`, each alone; write both to RANK.json."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    readings = itertools.count(step=(1 + rank) * 10**9)
    crew.now_ns = lambda: next(readings)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method="file://" + str(Path("store").resolve()), rank=rank, world_size=world
    )
    lines = crew.measured_link(Groups(Layout(dcp=world)), torch.device("cpu"), lambda: None)
    alone = crew.measured_link(Groups(Layout(dp=world)), torch.device("cpu"), lambda: None)
    Path(f"{rank}.json").write_text(
        json.dumps([{kind: str(line) for kind, line in lines.items()}, len(alone)])
    )
    dist.destroy_process_group()
    return 0
