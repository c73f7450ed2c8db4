"""What a decode step over ranks takes beside its ops and collectives: planning, copying, merging.

    python -m benchmarks.ranks.bookkeeping --layout dcp=2 --config deepseek-r1 --kv 16384 --batch 1

Real processes with gloo and a thread each. Every op and every collective of a step is timed; what is left of
the step, which begins before `cache.extend` and so plans anew, is bookkeeping: the layer's own, which one
device has as well (the first row), and that of the layout. In CPU time, since collectives have threads of
their own that take turns with a rank on its core.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import spawn  # type: ignore[attr-defined]  # its stubs do not export it

import mla
from benchmarks.ranks.nursery import free_port
from mla.bench.results.stats import median
from mla.bench.terminal.digits import number
from mla.cache import LatentCache
from mla.command.console import out
from mla.config import MLAConfig
from mla.parallel.cache import ShardedCache
from mla.parallel.groups import Groups, Traffic
from mla.parallel.layer import ParallelMLA
from mla.parallel.layout import Layout
from mla.parallel.share import Share
from mla.weights import random_state_dict

WARMUPS = 3


class Timed:
    """An op that adds the time of its calls to a sum."""

    def __init__(self, op: Any, add: Callable[[int], None]) -> None:
        self._op, self._add = op, add

    def __getattr__(self, name: str) -> Any:
        return getattr(self._op, name)

    def __call__(self, *arguments: Any, **tensors: Any) -> None:
        start = time.thread_time_ns()
        self._op(*arguments, **tensors)
        self._add(time.thread_time_ns() - start)


def make_cache(config: MLAConfig, groups: Groups, asked: argparse.Namespace, backend: Any) -> Any:
    """Return a cache with this rank's tokens of a random history, and its sequences."""
    room = asked.batch * (asked.kv + asked.steps + WARMUPS + 128)
    if groups.layout.dcp > 1:
        share = Share(groups.place.dcp, groups.layout.dcp)
        cache: Any = ShardedCache(config, share, max_tokens=room, page_size=64, device=backend.device)
    else:
        cache = LatentCache(config, max_tokens=room, page_size=64, device=backend.device)
    cache.pages.normal_()
    sequences = cache.new_sequences(asked.batch)
    kv, pe = torch.randn(asked.kv, config.kv_lora_rank), torch.randn(asked.kv, config.qk_rope_head_dim)
    for sequence in sequences:
        cache.load(sequence, kv.to(cache.pages), pe.to(cache.pages))
    return cache, sequences


Times = tuple[float, float, float, float]


def measure(layout: Layout, asked: argparse.Namespace) -> Times:
    """Return median milliseconds of this rank's steps, and CPU time of them, their ops and collectives."""
    backend, config = mla.load_backend(asked.backend), MLAConfig.named(asked.config)
    torch.set_num_threads(1)
    groups = Groups(layout)
    layer = ParallelMLA(config, groups, backend=backend)
    layer.load_state_dict(random_state_dict(config, 0, torch.bfloat16))
    spent: list[int] = []
    layer.replace_ops(lambda role, op: Timed(op, spent.append))
    cache, sequences = make_cache(config, groups, asked, backend)
    hidden = torch.randn(asked.batch, config.hidden_size, device=backend.device).bfloat16()
    result = torch.empty_like(hidden)
    found = []
    for _ in range(WARMUPS + asked.steps):
        dist.barrier()
        spent.clear()
        traffic = Traffic()
        start = time.perf_counter_ns(), time.thread_time_ns()
        with groups.clocked(time.thread_time_ns, traffic):
            layer(hidden, cache.extend(sequences, [1] * asked.batch), cache.pages[0], result)
        ended = time.perf_counter_ns(), time.thread_time_ns()
        found.append((ended[0] - start[0], ended[1] - start[1], sum(spent), traffic.ns))
    step, cpu, ops, collectives = (
        median([one / 1e6 for one in column]) for column in zip(*found[WARMUPS:], strict=True)
    )
    return step, cpu, ops, collectives


def run_rank(rank: int, layout: Layout, asked: argparse.Namespace, port: int) -> None:
    """Be one rank; rank 0 prints the table."""
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=layout.world)
    mine = measure(layout, asked)
    every: list[Any] = [None] * layout.world
    dist.all_gather_object(every, mine)
    if rank == 0:
        for other, (step, cpu, ops, collectives) in enumerate(every):
            rest = cpu - ops - collectives
            times = (number(one) for one in (step, cpu, ops, collectives, rest))
            out("| " + " | ".join((str(layout), str(other), *times, f"{rest / (ops + rest):.1%}")) + " |\n")
    dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the ranks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layout", type=Layout.parse, default=Layout.parse("dcp=2"))
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--config", default="deepseek-r1")
    parser.add_argument("--kv", type=int, default=16384, help="tokens of the history")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    asked = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    out("| layout | rank | step ms | CPU ms | ops | collectives | rest | of ops and rest |\n")
    out("| --- | --- | --- | --- | --- | --- | --- | --- |\n")
    for layout in (Layout.parse("tp=1"), asked.layout):
        spawn(run_rank, (layout, asked, free_port()), nprocs=layout.world)
    return 0


if __name__ == "__main__":
    sys.exit(main())
