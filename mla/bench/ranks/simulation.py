"""`Simulation`: a layout with more ranks than there are devices, of which each runs on the one at hand.

Outputs are those of all ranks, merged for real. Times are predicted: each rank whose share differs is timed
alone, with what the others gave it already in its memory, and collectives are added from a model of the link.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter_ns as now_ns
from typing import Any, cast

import torch

from mla.bench.ranks.layers import LeadLayer, RankLayer
from mla.bench.results.schema import LinkLine, RankFacts, Spread
from mla.bench.results.stats import median
from mla.bench.subjects.base import Implementation, Outputs, Shelf, poison
from mla.bench.subjects.inputs import Inputs, Requests
from mla.bench.subjects.setting import Ranks, Setting
from mla.bench.workload.scenario import Scenario
from mla.parallel.groups import SimulatedGroups, SimulatedWorld
from mla.parallel.layout import Layout
from mla.parallel.link import Link

# Bound before any plugin loads.
_random = random.SystemRandom()


class SimulatedPart(RankLayer):
    """One rank's part, whose forward may be run again. Ranks with the same requests share their inputs.

    Of a rank that `keeps` none, outputs are overwritten by the next forward.
    """

    def __init__(
        self, setting: Setting, state: Any, name: str, ops: str | None, groups: SimulatedGroups
    ) -> None:
        super().__init__(setting, state, name, ops, groups)
        self.groups = groups
        self.keeps = groups.place.tp == 0  # the parts of tp have the same outputs
        self.first: SimulatedPart = self  # of the ranks with the same requests

    def _make_buffers(self, scenario: Scenario, inputs: Inputs) -> None:
        if self.keeps:
            super()._make_buffers(scenario, inputs)
        if self.first is not self:
            first = self.first
            self.scenario, self._hidden, self._inputs = scenario, first._hidden, first._inputs
        if not self.keeps:
            only = torch.empty_like(first._shelf.next())
            self._shelf, self._held = Shelf([only], 1, poison), {}

    def extend(self, table_tokens: int = 0) -> Any:
        self.batch = super().extend(table_tokens)
        return self.batch

    def undo(self) -> None:
        """Go back to before the last forward, whose results are overwritten, and receive again."""
        self.clear_new(self.batch)
        if self.scenario.mode == "decode":
            grown = list(zip(self._sequences, self.scenario.query_lens, strict=True))
            for sequence, new in reversed(grown):  # the free list, and so the next pages, are as before
                self._cache.truncate(sequence, self._cache.length(sequence) - new)
        poison(self.out)
        self.groups.receive_again()


class Simulation(Ranks):
    """The ranks of `layout` on one device."""

    library = "a model of the link"

    def __init__(self, layout: Layout, link: Link, source: str) -> None:
        """`source` says where the numbers of the link are from."""
        self.layout, self.link, self.source = layout, link, source
        self.assumed = f"link {link} ({source})"

    def layer(
        self, setting: Setting, state: Mapping[str, torch.Tensor], name: str, ops: str | None
    ) -> Implementation:
        """Return a layer of which every rank's part is run."""
        world = SimulatedWorld(self.layout)
        parts = [SimulatedPart(setting, state, name, ops, groups) for groups in world.groups]
        return SimulatedLayer(setting, parts, world, self)


class SimulatedLayer(LeadLayer):
    """Runs all ranks before each forward that is timed, which is rank 0's; the others are timed beside it."""

    def __init__(
        self, setting: Setting, parts: Sequence[SimulatedPart], world: SimulatedWorld, simulation: Simulation
    ) -> None:
        super().__init__(setting, parts[0], cast("Any", simulation))  # there is nobody to talk to
        self._parts, self._world, self._simulation = parts, world, simulation
        self._kept_parts = [part for part in parts if part.keeps]
        for part in parts:
            part.first = parts[part.groups.place.dp * world.layout.head_parts]
        self._times: dict[int, list[float]] = {}  # of this pass, by rank that is timed
        self._passes: dict[int, list[float]] = {}  # of the result's passes

    # ------------------------------------------------------------------------------------------ passes

    def load(self, scenario: Scenario, inputs: Inputs) -> None:
        self.scenario = scenario
        seed = _random.getrandbits(63)
        for part in self._parts:
            part.load_alike(scenario, inputs, seed)
        self._stands_for = [self._timed(part, scenario) for part in self._parts]
        self._others = sorted(set(self._stands_for) - {0}, reverse=True)
        self._passes = self._passes or {rank: [] for rank in (0, *self._others)}

    def _timed(self, part: SimulatedPart, scenario: Scenario) -> int:
        """Return the first rank whose share is like this one: its requests as long, and its tokens."""
        layout = self._world.layout

        def share(rank: int) -> object:
            place = layout.place(rank)
            block = Requests.of(scenario, place.dp, layout.dp).scenario(scenario)
            return place.dcp, block.query_lens, block.history

        this = share(part.groups.rank)
        return next(rank for rank in range(layout.world) if share(rank) == this)

    def restore(self, number: int = 0) -> None:
        self._number, self._outputs = number, []
        self._times = {rank: [] for rank in self._others}
        for part in self._parts:
            part.restore(number)

    def before(self, index: int) -> None:
        """Run the forward of all ranks, then every other rank that is timed, and leave rank 0 ready."""
        for part in self._parts:
            part.ready(index)
        for part in self._parts:
            if part.first is part:
                part.show(index)
            poison(part.out)
            if self.scenario.mode == "decode":
                part.extend()
        for ranks in self._world.layout.head_groups():
            self._world.run(ranks, self._meet)
        for part in self._kept_parts:
            if part.groups.rank not in self._passes:
                self._world.complete(part.groups.rank, part.out)
        for rank in self._others:
            self._times[rank].append(self._time(rank, index))
        self._warm(0, index)
        self._part.show(index)

    def _meet(self, rank: int) -> None:
        """Run a rank's part of a forward, as far as other ranks let it."""
        part = self._parts[rank]
        part.forward(part.batch, part.x, part.out)

    def meet(self) -> None:
        """Nobody is waited for: all have run."""

    def _warm(self, rank: int, index: int) -> None:
        """Have the caches hold what they do after this rank's own last forward; then it may run again."""
        part = self._parts[rank]
        part.undo()
        part.step(index)
        part.undo()

    def _time(self, rank: int, index: int) -> float:
        """Return the milliseconds of one rank's forward alone, and leave its output whole."""
        part, synchronize = self._parts[rank], self.setting.backend.synchronize
        self._warm(rank, index)
        synchronize()
        start = now_ns()
        part.step(index)
        synchronize()
        taken = (now_ns() - start) / 1e6
        self._world.complete(rank, part.out)
        return taken

    def step(self, index: int) -> None:
        self._part.step(index)

    def after(self, index: int) -> None:
        self._world.complete(0, self._part.out)
        for part in self._kept_parts:
            part.after(index)

    def slowest(self, samples: list[float]) -> list[float]:
        """Return the predicted milliseconds: of the slowest rank, its collectives included."""
        times = {0: samples, **self._times}
        if 1 <= self._number <= self.scenario.rounds:  # a pass of the result
            for rank, kept in self._passes.items():
                kept += times[rank]
        predicted = ([ms + self._collective_ms(rank) for ms in taken] for rank, taken in times.items())
        return [max(by_rank) for by_rank in zip(*predicted, strict=True)]

    def outputs(self) -> Outputs:
        if not self._outputs:
            self._outputs = [part.outputs() if part.keeps else {} for part in self._parts]
        return self._whole(0)

    def _copies(self) -> int:
        return self._world.layout.dcp

    def lengths_bench(self) -> None:
        """Nothing runs on new lengths: all ranks would have to rehearse every one."""

    # ------------------------------------------------------------------------------------------- facts

    def _predicted(self, rank: int) -> list[float]:
        """Return the milliseconds of a rank's forwards: its own, and its collectives."""
        return [ms + self._collective_ms(rank) for ms in self._passes[rank]]

    def _collective_ms(self, rank: int) -> float:
        return 1e3 * self._simulation.link.seconds(self._parts[rank].groups.calls)

    def spread(self) -> Spread:
        """Return every rank's part; those that are alike have the same samples."""
        link = self._simulation.link
        return Spread(
            layout=str(self._world.layout),
            library=self._simulation.library,
            ranks=[self._facts(part) for part in self._parts],
            predicted=True,
            timed_ranks=sorted(self._passes),
            link=[LinkLine.of(kind, line) for kind, line in link.lines.items()],
            link_source=self._simulation.source,
            compute_ms=median([max(samples) for samples in zip(*self._passes.values(), strict=True)]),
        )

    def _facts(self, part: SimulatedPart) -> RankFacts:
        rank, facts = part.groups.rank, part.facts()
        return RankFacts(
            rank=rank,
            samples=self._predicted(self._stands_for[rank]),
            collective_ms=self._collective_ms(self._stands_for[rank]),
            collective_bytes=sum(call.sent for call in part.groups.calls),
            cache_bytes=facts.cache_bytes,
            weight_bytes=facts.weight_bytes,
        )

    def replace_ops(self, replace: Callable[[str, Any], Any]) -> None:
        for part in self._parts:
            part.replace_ops(replace)
