"""`Groups`: this rank's process groups, and the exchanges that a parallel layer makes.

`SimulatedGroups` are those of one rank that runs alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mla.errors import UsageError
from mla.parallel.layout import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, Call, Layout

# Newer releases of torch deprecate the name that older ones have.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


# Outputs of so many ranks are added up in the layer's dtype, as engines do; of more, in float32: each hop
# rounds, and 16 of them cost as much accuracy as the whole layer.
MOST_HOPS = 8
# A log-sum-exp that weighs nothing beside any real one, and as much as others like it.
LEAST_LSE = -1e30


class CollectiveError(RuntimeError):
    """A collective failed: another rank is gone, or late, or in another one."""


@dataclass
class Traffic:
    """What collectives took while they were clocked: nanoseconds, and bytes that this rank sent."""

    ns: int = 0
    sent: int = 0


class Groups:
    """The groups of one rank: `heads` together have all heads. Every rank must make them, in the same order.

    `torch.distributed` must be initialized with as many ranks as the layout has. `timeout` bounds the wait
    for another rank, in seconds. Raises `UsageError`.
    """

    def __init__(self, layout: Layout, timeout: float | None = None) -> None:
        if not dist.is_initialized():
            raise UsageError("torch.distributed is not initialized: start this with torchrun or srun.")
        if dist.get_world_size() != layout.world:
            raise UsageError(
                f"layout '{layout}' needs {layout.world} ranks, and {dist.get_world_size()} were started."
            )
        self.layout = layout
        self.rank = dist.get_rank()
        self.place = layout.place(self.rank)
        self.heads = _group_of(layout.groups(layout.head_parts), self.rank, timeout)
        self._context = _group_of(layout.groups(layout.dcp), self.rank, timeout)
        self._clocked: tuple[Traffic, Callable[[], int]] | None = None
        self.entered = self.left = 0  # collectives, for whoever asks where this rank is

    @contextmanager
    def clocked(self, now_ns: Callable[[], int], traffic: Traffic) -> Iterator[None]:
        """Add what collectives in the `with` block take to `traffic`.

        `now_ns` waits for the device and reads a clock.
        """
        self._clocked = (traffic, now_ns)
        try:
            yield
        finally:
            self._clocked = None

    def add_heads(self, out: torch.Tensor) -> None:
        """Add up `out` over the ranks that together have all heads, in place."""
        size = self.layout.head_parts
        if size == 1:
            return
        total = out if size <= MOST_HOPS else out.float()
        self._run(Call(ALL_REDUCE, size, total.nbytes), dist.all_reduce, total, group=self.heads)
        if total is not out:
            out.copy_(total)

    def gather_context(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Write the contiguous x [t, ...] of every rank of the context group to out [dcp, t, ...]."""
        call = Call(ALL_GATHER, self.layout.dcp, x.nbytes)
        self._run(call, all_gather, out.flatten(0, 1), x, group=self._context)

    def exchange_context(self, parts: torch.Tensor, out: torch.Tensor) -> None:
        """Send parts[i] to rank i of the context group, and write what rank i sent to out[i].

        Both are contiguous [dcp, ...].
        """
        call = Call(ALL_TO_ALL, self.layout.dcp, parts.nbytes)
        self._run(call, dist.all_to_all_single, out, parts, group=self._context)

    def _run(self, call: Call, collective: Callable[..., Any], *tensors: torch.Tensor, group: Any) -> None:
        self.entered += 1
        try:
            if self._clocked is None:
                collective(*tensors, group=group)
            else:
                traffic, now_ns = self._clocked
                start = now_ns()
                collective(*tensors, group=group)
                traffic.ns += now_ns() - start
                traffic.sent += call.sent
        except RuntimeError as error:
            raise CollectiveError(str(error)) from error
        self.left += 1


def lse_of(rows: torch.Tensor) -> torch.Tensor:
    """Return the lse [...] of rows [..., width] of out and lse, as a view: their last four bytes in fp32."""
    return rows.view(torch.float32)[..., -1]


def _group_of(groups: list[list[int]], rank: int, timeout: float | None) -> dist.ProcessGroup | None:
    """Make all groups, as every rank must, and return the one that `rank` is in."""
    limit = None if timeout is None else timedelta(seconds=timeout)
    made: list[tuple[list[int], Any]] = [(ranks, dist.new_group(ranks, timeout=limit)) for ranks in groups]
    return next(group for ranks, group in made if rank in ranks)


class SimulatedGroups(Groups):
    """The groups of one rank that runs alone: the others are taken to send it what it sends them.

    So it attends, for its own heads, the tokens that it has. In a rehearsal all messages are received. When
    the same forward then runs on a clock they are there, as the link's formula has their time: only memory
    in which a forward receives several messages is written again.
    """

    def __init__(self, layout: Layout, rank: int) -> None:
        self.layout, self.rank, self.place = layout, rank, layout.place(rank)
        self.heads = self._context = None
        self.calls: list[Call] = []  # of the last rehearsal
        self._rehearses, self._received = True, Counter[int]()  # by address

    def rehearse(self, forward: Callable[[], object]) -> None:
        """Run a forward in which every message is received."""
        self.calls, self._received, self._rehearses = [], Counter(), True
        forward()
        self._rehearses = False

    def _run(self, call: Call, collective: object, *tensors: torch.Tensor, group: object) -> None:
        """Write what all ranks are taken to send, where it is received; a sum stays this rank's part."""
        if self._rehearses:
            self.calls.append(call)
        if call.kind == ALL_REDUCE:
            return
        out, given = tensors
        if self._rehearses:
            self._received[out.data_ptr()] += 1
        elif self._received[out.data_ptr()] == 1:
            return
        if call.kind == ALL_GATHER:
            out.unflatten(0, (call.ranks, -1)).copy_(given)
        else:  # parts are alike: together they weigh as much as one; of a token that attends nothing, nothing
            out.copy_(given)
            lse_of(out).sub_(math.log(call.ranks)).clamp_(min=LEAST_LSE)
