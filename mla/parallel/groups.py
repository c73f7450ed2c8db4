"""`Groups`: this rank's process groups, and the four exchanges that a parallel layer makes."""

from __future__ import annotations

import torch
import torch.distributed as dist

from mla.errors import UsageError
from mla.parallel.layout import Layout

# Newer releases of torch deprecate the name that older ones have.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Groups:
    """The groups of one rank. Every rank of the world must make them, in the same order.

    `torch.distributed` must be initialized with as many ranks as the layout has. Raises `UsageError`.
    """

    def __init__(self, layout: Layout) -> None:
        if not dist.is_initialized():
            raise UsageError("torch.distributed is not initialized: start this with torchrun or srun.")
        if dist.get_world_size() != layout.world:
            raise UsageError(
                f"layout '{layout}' needs {layout.world} ranks, and {dist.get_world_size()} were started."
            )
        self.layout = layout
        self.rank = dist.get_rank()
        self.place = layout.place(self.rank)
        self._heads = _own(layout.head_groups(), self.rank)
        self._context = _own(layout.context_groups(), self.rank)

    def add_heads(self, out: torch.Tensor) -> None:
        """Add up `out` over the ranks that together have all heads, in place."""
        if self.layout.head_parts > 1:
            dist.all_reduce(out, group=self._heads)

    def gather_context(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Write the contiguous x [...] of every rank of the context group to out [dcp, ...]."""
        _all_gather(out.flatten(0, 1), x, group=self._context)

    def exchange_context(self, parts: torch.Tensor, out: torch.Tensor) -> None:
        """Send parts[i] to rank i of the context group, and write what rank i sent to out[i].

        Both are contiguous [dcp, ...].
        """
        dist.all_to_all_single(out, parts, group=self._context)


def _own(groups: list[list[int]], rank: int) -> dist.ProcessGroup | None:
    """Make all groups, as every rank must, and return the one that `rank` is in."""
    made = [(ranks, dist.new_group(ranks)) for ranks in groups]
    return next(group for ranks, group in made if rank in ranks)
