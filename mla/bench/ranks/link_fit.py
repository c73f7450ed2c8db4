"""The link between real ranks: every kind of collective, timed with a small and a large tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import perf_counter_ns as now_ns
from typing import Any

import torch
import torch.distributed as dist

from mla.bench.results.stats import median
from mla.parallel.groups import Groups, all_gather
from mla.parallel.link import Call, Line, fit

# Bytes of a tensor: below the first, a message costs about as much as an empty one; the second is that of a
# prefill's output. Collectives of each that are timed, after as many warm-ups.
SMALL, LARGE, TIMES, WARMUPS = 32 << 10, 8 << 20, 11, 3


def measured(groups: Groups, device: torch.device, synchronize: Callable[[], None]) -> dict[str, Line]:
    """Return kind -> line, among the ranks that share all heads; {} for one rank alone.

    All of them must call it together. Each has times of its own, and of a collective the slowest counts.
    """
    if groups.layout.head_parts == 1:
        return {}
    found = {}
    for small, large in zip(_tried(groups, device, SMALL), _tried(groups, device, LARGE), strict=True):
        seconds = [_seconds(run, synchronize, groups.heads) for _, run in (small, large)]
        found[small[0].kind] = fit((small[0], seconds[0]), (large[0], seconds[1]))
    return found


def _tried(groups: Groups, device: torch.device, nbytes: int) -> Iterator[tuple[Call, Callable[[], Any]]]:
    """Yield every kind of collective on tensors of about so many bytes."""
    ranks, group = groups.layout.head_parts, groups.heads
    x = torch.zeros(ranks, nbytes // ranks // 2, dtype=torch.bfloat16, device=device)
    out, part = torch.zeros_like(x), torch.zeros_like(x[0])
    yield Call.all_reduce(x.nbytes, ranks), lambda: dist.all_reduce(x, group=group)
    yield Call.all_gather(part.nbytes, ranks), lambda: all_gather(out.view(-1), part, group=group)
    yield Call.all_to_all(x.nbytes, ranks), lambda: dist.all_to_all_single(out, x, group=group)


def _seconds(run: Callable[[], Any], synchronize: Callable[[], None], group: Any) -> float:
    """Return the seconds of a collective from a common start, on the slowest rank."""
    taken = []
    for turn in range(WARMUPS + TIMES):
        dist.barrier(group=group)
        synchronize()
        start = now_ns()
        run()
        synchronize()
        if turn >= WARMUPS:
            taken.append((now_ns() - start) / 1e9)
    slowest: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(slowest, taken, group=group)
    return median([max(times) for times in zip(*slowest, strict=True)])
