"""`Simulation`: a layout with more ranks than there are devices, predicted on the one at hand.

Each rank whose share differs runs alone, timed and judged by an oracle of its share. Nothing is merged:
collectives are added from a model of the link.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from time import perf_counter_ns as now_ns
from typing import Any

import msgspec

from mla.bench.ranks.layers import RankLayer
from mla.bench.results.schema import LinkLine, RankFacts, Spread
from mla.bench.results.stats import median
from mla.bench.subjects.base import Facts, Implementation, LayerChecker, Outputs, poison, worst
from mla.bench.subjects.fixture import layer_checker
from mla.bench.subjects.inputs import Inputs, Requests
from mla.bench.subjects.selected import TakenChecker
from mla.bench.subjects.setting import Ranks, Setting
from mla.bench.workload.scenario import Scenario
from mla.parallel.groups import SimulatedGroups
from mla.parallel.layer import HeadShard
from mla.parallel.layout import Layout, Link, Share
from mla.verify.layer_oracle import State
from mla.verify.verdict import Check


class SimulatedPart(RankLayer):
    """One rank's part, run without the others."""

    def __init__(self, setting: Setting, state: State, name: str, ops: str | None, rank: int) -> None:
        assert setting.ranks is not None
        self.groups = SimulatedGroups(setting.ranks.layout, rank)
        super().__init__(setting, state, name, ops, self.groups)

    def extend(self, table_tokens: int = 0) -> Any:
        self.batch = super().extend(table_tokens)
        return self.batch

    def rehearse(self, index: int) -> None:
        """Run a forward, which receives what others send, and undo it: it may run again, on the clock."""
        self.before(index)
        self.groups.rehearse(lambda: self.step(index))
        self.clear_new(self.batch)
        if self.scenario.mode == "decode":
            self._shrink(index)
        poison(self.out)

    def time(self, index: int) -> float:
        """Rehearse a forward, run it, and return its milliseconds."""
        self.rehearse(index)
        synchronize = self.setting.backend.synchronize
        synchronize()
        start = now_ns()
        self.step(index)
        synchronize()
        taken = (now_ns() - start) / 1e6
        self.after(index)
        return taken


@dataclass(frozen=True)
class ShareCheckers:
    """What judges each rank that runs, alone: by rank, its requests and the checker of its share."""

    scenario: Scenario
    by_rank: Mapping[int, tuple[Requests, LayerChecker | TakenChecker]]

    def of(self, inputs: Inputs, count: int) -> ShareCheckers:
        """Return the checkers of the first forwards of a plain pass of other inputs."""
        made = {
            rank: (requests, checker.of(requests.inputs(self.scenario, inputs), count))
            for rank, (requests, checker) in self.by_rank.items()
        }
        return ShareCheckers(self.scenario, made)


class Simulation(Ranks):
    """The ranks of `layout`, those that differ one after the other on one device."""

    library = "a model of the link"

    def __init__(self, layout: Layout, link: Link, source: str) -> None:
        """`source` says where the numbers of the link are from."""
        self.layout, self.link, self.source = layout, link, source
        self.assumed = f"link {link} ({source})"

    def stand_ins(self, scenario: Scenario) -> list[int]:
        """Return by rank the first one with such a share: the same tokens, of requests as long."""
        first: dict[object, int] = {}
        ranks = []
        for rank in range(self.world):
            place = self.layout.place(rank)
            block = Requests.of(scenario, place.dp, self.layout.dp).scenario(scenario)
            ranks.append(first.setdefault((place.dcp, block.query_lens, block.history), rank))
        return ranks

    def timed(self, scenario: Scenario) -> list[int]:
        return sorted(set(self.stand_ins(scenario)))

    def layer(self, setting: Setting, state: State, name: str, ops: str | None) -> Implementation:
        return SimulatedLayer(setting, state, name, ops, self)

    def checker(
        self, setting: Setting, state: State, inputs: Inputs, beat: Callable[[], None]
    ) -> ShareCheckers:
        layout, scenario = self.layout, inputs.scenario
        config = setting.config.with_heads(setting.config.num_attention_heads // layout.head_parts)
        share = replace(setting, config=config)

        def of_rank(rank: int) -> tuple[Requests, LayerChecker | TakenChecker]:
            def reference() -> SimulatedPart:
                part = SimulatedPart(setting, state, "mla-reference", "reference", rank)
                part.load(scenario, inputs)
                return part

            place = layout.place(rank)
            held = Share(place.dcp, layout.dcp).owns if layout.dcp > 1 else None
            shard = dict(HeadShard(state, setting.config, layout.head_part(rank), layout.head_parts))
            requests = Requests.of(scenario, place.dp, layout.dp)
            mine = requests.inputs(scenario, inputs)
            return requests, layer_checker(share, shard, mine, reference, beat, held)

        return ShareCheckers(scenario, {rank: of_rank(rank) for rank in self.timed(scenario)})


class SimulatedLayer(Implementation):
    """Times rank 0's forwards as those of one device, and before each the other ranks' that differ."""

    def __init__(
        self, setting: Setting, state: State, name: str, ops: str | None, simulation: Simulation
    ) -> None:
        super().__init__(setting)
        self.name, self._simulation = name, simulation
        self._make = lambda rank: SimulatedPart(setting, state, name, ops, rank)
        self._parts = {0: self._make(0)}  # by rank, once loaded all that differ
        self.held_to_reference = self._parts[0].held_to_reference
        self._times: dict[int, list[float]] = {}  # of this pass, by rank other than 0
        self._passes: dict[int, list[float]] = {}  # of the result's passes

    def load(self, scenario: Scenario, inputs: Inputs) -> None:
        self.scenario = scenario
        for rank in self._simulation.timed(scenario):
            if rank not in self._parts:
                self._parts[rank] = self._make(rank)
            self._parts[rank].load(scenario, inputs)
            self._passes.setdefault(rank, [])

    def restore(self, number: int = 0) -> None:
        self.number = number
        self._times = {rank: [] for rank in self._parts if rank}
        for part in self._parts.values():
            part.restore(number)

    def before(self, index: int) -> None:
        for rank, times in self._times.items():
            times.append(self._parts[rank].time(index))
        self._parts[0].rehearse(index)

    def step(self, index: int) -> None:
        self._parts[0].step(index)

    def after(self, index: int) -> None:
        self._parts[0].after(index)

    def slowest(self, samples: list[float]) -> list[float]:
        """Return the predicted milliseconds: of the slowest rank, its collectives included."""
        times = {0: samples, **self._times}
        if 1 <= self.number <= self.scenario.rounds:  # a pass of the result
            for rank, kept in self._passes.items():
                kept += times[rank]
        predicted = ([ms + self._collective_ms(rank) for ms in taken] for rank, taken in times.items())
        return [max(by_rank) for by_rank in zip(*predicted, strict=True)]

    def outputs(self) -> Outputs:
        """Return rank 0's part of the outputs."""
        return self._parts[0].outputs()

    def check(self, checker: ShareCheckers) -> Check:
        checks = [part.check(checker.by_rank[rank][1]) for rank, part in self._parts.items()]
        place = worst(checks)
        if checks[place].reason:
            checks[place].reason = f"on rank {list(self._parts)[place]}: {checks[place].reason}"
        return checks[place]

    def facts(self) -> Facts:
        return self._parts[0].facts()

    def _collective_ms(self, rank: int) -> float:
        return 1e3 * self._simulation.link.seconds(self._parts[rank].groups.calls)

    def spread(self) -> Spread:
        """Return every rank's part; those that are alike have the same samples."""
        simulation = self._simulation
        timed = {rank: self._facts(rank) for rank in self._parts}
        stand_ins = enumerate(simulation.stand_ins(self.scenario))
        return Spread(
            layout=str(simulation.layout),
            library=simulation.library,
            ranks=[msgspec.structs.replace(timed[like], rank=rank) for rank, like in stand_ins],
            predicted=True,
            timed_ranks=sorted(timed),
            link=[LinkLine.of(kind, line) for kind, line in simulation.link.lines.items()],
            link_source=simulation.source,
            compute_ms=median([max(samples) for samples in zip(*self._passes.values(), strict=True)]),
        )

    def _facts(self, rank: int) -> RankFacts:
        part, collective_ms = self._parts[rank], self._collective_ms(rank)
        return RankFacts(
            rank=rank,
            samples=[ms + collective_ms for ms in self._passes[rank]],
            collective_ms=collective_ms,
            collective_bytes=sum(call.sent for call in part.groups.calls),
            cache_bytes=part.facts().cache_bytes,
            weight_bytes=part.facts().weight_bytes,
        )
