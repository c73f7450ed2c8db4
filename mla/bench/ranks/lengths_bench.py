"""Forwards on new lengths over ranks: each runs its part of every one, from a common start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mla.bench.doubts.new_lengths import LayerBench, Lengths, Times
from mla.bench.ranks.part import RankLayer

# Of one forward, in milliseconds: with all that it takes, and planning alone.
Sample = tuple[float, float]


class RankBench:
    """One rank's part of it. Every rank must make one, and run it, at the same time."""

    def __init__(self, part: RankLayer, meet: Callable[[], None]) -> None:
        """`meet` returns once every rank has called it."""
        self.layer, self._meet = part, meet
        self._bench = LayerBench(part)

    def run(self, lengths: Lengths, count: int, beat: Callable[[], None] = lambda: None) -> list[Sample]:
        """Run `count` forwards on these lengths of all requests, and return what this rank's part took."""
        first, stop = self.layer.requests.first, self.layer.requests.stop
        own = Lengths(lengths.query_lens[first:stop], lengths.kv_lens[first:stop])
        rounds = [Times() for _ in range(count)]
        self._meet()  # once: a rank that refuses such lengths comes to no further forward
        self._bench.run(own, rounds, beat)
        return [(times.forward[0], times.plan[0]) for times in rounds]


class LeadBench:
    """The bench of all ranks together (as `mla.bench.doubts.new_lengths.LayerBench`): the slowest counts."""

    def __init__(self, lead: Any, own: RankBench) -> None:
        self._lead, self._own = lead, own
        self.layer = own.layer

    def run(self, lengths: Lengths, rounds: Sequence[Times], beat: Callable[[], None]) -> None:
        by_rank = self._lead.run_lengths(self._own, lengths, len(rounds), beat)
        for times, *samples in zip(rounds, *by_rank, strict=True):
            forward, plan = (max(each) for each in zip(*samples, strict=True))
            times.forward.append(forward)
            times.plan.append(plan)
