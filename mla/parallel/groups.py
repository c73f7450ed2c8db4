"""`Groups`: this rank's process groups, and the exchanges that a parallel layer makes.

`SimulatedWorld` has those of all ranks of a layout in one process, which exchange through memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mla.errors import UsageError
from mla.parallel.layout import Layout
from mla.parallel.link import Call

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
        self.heads = _group_of(layout.head_groups(), self.rank, timeout)
        self._context = _group_of(layout.context_groups(), self.rank, timeout)
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
        self._run(Call.all_reduce(total.nbytes, size), dist.all_reduce, total, group=self.heads)
        if total is not out:
            out.copy_(total)

    def gather_context(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Write the contiguous x [t, ...] of every rank of the context group to out [dcp, t, ...]."""
        call = Call.all_gather(x.nbytes, self.layout.dcp)
        self._run(call, all_gather, out.flatten(0, 1), x, group=self._context)

    def exchange_context(self, parts: torch.Tensor, out: torch.Tensor) -> None:
        """Send parts[i] to rank i of the context group, and write what rank i sent to out[i].

        Both are contiguous [dcp, ...].
        """
        call = Call.all_to_all(parts.nbytes, self.layout.dcp)
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


def summed_bytes(out: torch.Tensor, ranks: int) -> int:
    """Return the bytes of what so many ranks add up of an output: many of them, copies in float32."""
    return out.nbytes if ranks <= MOST_HOPS else out.numel() * torch.float32.itemsize


def _group_of(groups: list[list[int]], rank: int, timeout: float | None) -> dist.ProcessGroup | None:
    """Make all groups, as every rank must, and return the one that `rank` is in."""
    limit = None if timeout is None else timedelta(seconds=timeout)
    made: list[tuple[list[int], Any]] = [(ranks, dist.new_group(ranks, timeout=limit)) for ranks in groups]
    return next(group for ranks, group in made if rank in ranks)


class _Waiting(Exception):
    """Another rank has not given yet what this one needs."""


class SimulatedWorld:
    """The ranks of `layout`, of which one runs at a time."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.groups = [SimulatedGroups(self, rank) for rank in range(layout.world)]

    def run(self, ranks: Sequence[int], forward: Callable[[int], None]) -> None:
        """Run `forward(rank)` of ranks that together have all heads; outputs are not yet added up.

        It may be called several times for each, and must do the same every time. Raises RuntimeError where
        ranks disagree about their collectives.
        """
        left = members = [self.groups[rank] for rank in ranks]
        for member in members:
            member.forget()
        while left:
            given = sum(len(member.given) for member in members)
            left = [member for member in left if not member.runs_through(forward)]
            if left and given == sum(len(member.given) for member in members):
                raise RuntimeError(f"rank {left[0].rank} waits for what no other rank gives.")

    def complete(self, rank: int, out: torch.Tensor) -> None:
        """Add to a rank's part of the output [T, d] those of the others, in place, rank by rank."""
        members = self._members(self.layout.head_groups(), rank)
        parts = [out if member.rank == rank else member.part for member in members]
        total = parts[0].float() if len(parts) > MOST_HOPS else parts[0].clone()
        for part in parts[1:]:
            total += part
        out.copy_(total)

    def context(self, rank: int) -> list[SimulatedGroups]:
        """Return the ranks that share a rank's requests, in their order."""
        return self._members(self.layout.context_groups(), rank)

    def _members(self, groups: list[list[int]], rank: int) -> list[SimulatedGroups]:
        return [self.groups[member] for member in next(group for group in groups if rank in group)]


class SimulatedGroups(Groups):
    """One rank's end of every collective."""

    def __init__(self, world: SimulatedWorld, rank: int) -> None:
        self._world, self.layout, self.rank = world, world.layout, rank
        self.place = self.layout.place(rank)
        self._clocked = None
        self._meeting = False  # in a forward that all ranks run
        self.part: torch.Tensor  # of the output, of the last forward
        self.forget()

    def forget(self) -> None:
        """Begin another forward."""
        self.given: list[torch.Tensor] = []  # to other ranks of the context, by collective
        self.calls: list[Call] = []  # of the last forward
        self._received: list[tuple[Callable[[], None], torch.Tensor]] = []
        self._place = 0  # of the next collective

    def runs_through(self, forward: Callable[[int], None]) -> bool:
        """Return whether a forward came to its end; if not, other ranks must give something first."""
        self.calls, self._received, self._place, self._meeting = [], [], 0, True
        try:
            forward(self.rank)
        except _Waiting:
            return False
        finally:
            self._meeting = False
        return True

    def receive_again(self) -> None:
        """Put what others gave back to where it was received: the forward may have overwritten it."""
        self._place = 0
        for receive, _ in self._received:
            receive()

    def add_heads(self, out: torch.Tensor) -> None:
        """Keep this rank's part of the output, which `SimulatedWorld.complete` adds up."""
        size = self.layout.head_parts
        if self._meeting:
            self.part = out.clone()
            self.calls += [Call.all_reduce(summed_bytes(out, size), size)] if size > 1 else []

    def gather_context(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Write x [t, ...] of every rank of the context group to out [dcp, t, ...]."""
        self._collective(Call.all_gather(x.nbytes, self.layout.dcp), x, out, lambda given: given)

    def exchange_context(self, parts: torch.Tensor, out: torch.Tensor) -> None:
        """Write to out[i] what rank i of the context group has for this one."""
        call = Call.all_to_all(parts.nbytes, self.layout.dcp)
        self._collective(call, parts, out, lambda given: given[self.place.dcp])

    def _collective(
        self, call: Call, x: torch.Tensor, out: torch.Tensor, mine: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Give x to the others and receive theirs, in a forward that all run; alone, find what was received.

        `mine`: what this rank gets of what another gave. Raises `_Waiting` if one has not given its own.
        """
        place = self._place
        if not self._meeting:
            receive, received = self._received[place]
            if sum(buffer.data_ptr() == out.data_ptr() for _, buffer in self._received) > 1:
                receive()  # on the clock, too: a later part of the same forward has overwritten it
            elif received.data_ptr() != out.data_ptr():  # its memory has moved
                out.copy_(received)
        else:
            members = self._world.context(self.rank)
            if len(self.given) == place:
                self.given.append(x.clone())
            if any(len(member.given) <= place for member in members):
                raise _Waiting

            def receive() -> None:
                for part, member in zip(out, members, strict=True):
                    part.copy_(mine(member.given[place]))

            receive()
            self.calls.append(call)
            self._received.append((receive, out))
        self._place += 1
