"""`SimulatedWorld`: all ranks of a layout in one process, on one device, which exchange through memory.

A forward of all ranks is run for real: each runs until it needs what another has not given yet, and again
from its beginning once that is there, as a forward may be repeated. After that a rank may run alone any
number of times: what others gave it is already where a collective would put it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mla.parallel.groups import MOST_HOPS, Groups, summed_bytes
from mla.parallel.layout import Layout
from mla.parallel.link import Call


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
        members = [self.groups[rank] for rank in ranks]
        for one in members:
            one.forget()
        left = members
        while left:
            given = sum(len(one.given) for one in members)
            left = [one for one in left if not one.runs_through(forward)]
            if left and given == sum(len(one.given) for one in members):
                raise RuntimeError(f"rank {left[0].rank} waits for what no other rank gives.")

    def complete(self, rank: int, out: torch.Tensor) -> None:
        """Add to a rank's part of the output [T, d] those of the others, in place, rank by rank."""
        own = self.groups[rank]
        parts = [out if one is own else one.part for one in self._members(self.layout.head_groups(), rank)]
        total = parts[0].float() if len(parts) > MOST_HOPS else parts[0].clone()
        for part in parts[1:]:
            total += part
        out.copy_(total)

    def context(self, rank: int) -> list[SimulatedGroups]:
        """Return the ranks that share a rank's requests, in their order."""
        return self._members(self.layout.context_groups(), rank)

    def _members(self, groups: list[list[int]], rank: int) -> list[SimulatedGroups]:
        return [self.groups[one] for one in next(group for group in groups if rank in group)]


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
        if self._meeting and self.layout.head_parts > 1:
            self.calls.append(
                Call.all_reduce(summed_bytes(out, self.layout.head_parts), self.layout.head_parts)
            )
        if self._meeting:
            self.part = out.clone()

    def gather_context(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Write x [t, ...] of every rank of the context group to out [dcp, t, ...]."""
        if self._meets(x, Call.all_gather(x.nbytes, self.layout.dcp)):
            place = self._place

            def receive() -> None:
                for part, one in zip(out, self._world.context(self.rank), strict=True):
                    part.copy_(one.given[place])

            self._receive(receive, out)
        self._arrive(out)

    def exchange_context(self, parts: torch.Tensor, out: torch.Tensor) -> None:
        """Write to out[i] what rank i of the context group has for this one."""
        if self._meets(parts, Call.all_to_all(parts.nbytes, self.layout.dcp)):
            place, own = self._place, self.place.dcp

            def receive() -> None:
                for part, one in zip(out, self._world.context(self.rank), strict=True):
                    part.copy_(one.given[place][own])

            self._receive(receive, out)
        self._arrive(out)

    def _meets(self, x: torch.Tensor, call: Call) -> bool:
        """Give x to the others, in a forward that all run. Raises `_Waiting` if one has not given its own."""
        if not self._meeting:
            return False
        if len(self.given) == self._place:
            self.given.append(x.clone())
        if any(len(one.given) <= self._place for one in self._world.context(self.rank)):
            raise _Waiting
        self.calls.append(call)
        return True

    def _receive(self, receive: Callable[[], None], out: torch.Tensor) -> None:
        self._received.append((receive, out))
        receive()

    def _arrive(self, out: torch.Tensor) -> None:
        """Go on to the next collective. What was received is in `out`, unless its memory has moved."""
        receive, received = self._received[self._place]
        if sum(one.data_ptr() == out.data_ptr() for _, one in self._received) > 1:
            receive()  # on the clock, too: a later part of the same forward has overwritten it
        elif received.data_ptr() != out.data_ptr():
            out.copy_(received)
        self._place += 1
