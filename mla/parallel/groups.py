"""`Groups`: this rank's process groups, and the exchanges that a parallel layer makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mla.errors import UsageError
from mla.parallel.layout import Layout

# Newer releases of torch deprecate the name that older ones have.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


# Outputs of so many ranks are added up in the layer's dtype, as engines do; of more, in float32: each hop
# rounds, and 16 of them cost as much accuracy as the whole layer.
MOST_HOPS = 8


class CollectiveError(RuntimeError):
    """A collective failed: another rank is gone, or late, or in another one."""


@dataclass
class Traffic:
    """What collectives took while they were clocked: nanoseconds, and bytes that this rank sent."""

    ns: int = 0
    sent: int = 0


class Groups:
    """The groups of one rank. Every rank of the world must make them, in the same order.

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
        self._heads = _own(layout.head_groups(), self.rank, timeout)
        self._context = _own(layout.context_groups(), self.rank, timeout)
        self._clocked: tuple[Traffic, Callable[[], int]] | None = None
        self.entered = self.left = 0  # collectives, for whoever asks where this rank is

    @property
    def heads(self) -> dist.ProcessGroup | None:
        """The ranks that together have all heads."""
        return self._heads

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
        # A ring sends every element but its own part twice.
        self._run(2 * total.nbytes * (size - 1) // size, dist.all_reduce, total, group=self._heads)
        if total is not out:
            out.copy_(total)

    def gather_context(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Write the contiguous x [t, ...] of every rank of the context group to out [dcp, t, ...]."""
        sent = x.nbytes * (self.layout.dcp - 1)
        self._run(sent, all_gather, out.flatten(0, 1), x, group=self._context)

    def exchange_context(self, parts: torch.Tensor, out: torch.Tensor) -> None:
        """Send parts[i] to rank i of the context group, and write what rank i sent to out[i].

        Both are contiguous [dcp, ...].
        """
        size = self.layout.dcp
        self._run(parts.nbytes * (size - 1) // size, dist.all_to_all_single, out, parts, group=self._context)

    def _run(self, sent: int, collective: Callable[..., Any], *tensors: torch.Tensor, group: Any) -> None:
        self.entered += 1
        try:
            if self._clocked is None:
                collective(*tensors, group=group)
            else:
                traffic, now_ns = self._clocked
                start = now_ns()
                collective(*tensors, group=group)
                traffic.ns += now_ns() - start
                traffic.sent += sent
        except RuntimeError as error:
            raise CollectiveError(str(error)) from error
        self.left += 1


def summed_bytes(out: torch.Tensor, ranks: int) -> int:
    """Return the bytes of what so many ranks add up of an output: many of them, copies in float32."""
    return out.nbytes if ranks <= MOST_HOPS else out.numel() * torch.float32.itemsize


def _own(groups: list[list[int]], rank: int, timeout: float | None) -> dist.ProcessGroup | None:
    """Make all groups, as every rank must, and return the one that `rank` is in."""
    limit = None if timeout is None else timedelta(seconds=timeout)
    made: list[tuple[list[int], Any]] = [(ranks, dist.new_group(ranks, timeout=limit)) for ranks in groups]
    return next(group for ranks, group in made if rank in ranks)
