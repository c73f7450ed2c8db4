"""A layer over several ranks: `RankLayer` is one rank's part, and `LeadLayer` on rank 0 the whole.

Every other rank has a `Follower`, which carries out the commands of rank 0.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter_ns as now_ns
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import torch

from mla.bench.limits.microbench import no_garbage_collection
from mla.bench.measure.evidence import LayerBench, Lengths, Sample
from mla.bench.plan.request import Request, ScenarioPlan
from mla.bench.results.schema import LinkLine, RankFacts, Spread
from mla.bench.results.stats import median
from mla.bench.subjects.base import Facts, Implementation, Left, Outputs, buffers, worst
from mla.bench.subjects.fixture import Fixture, make_fixture
from mla.bench.subjects.inputs import Inputs, Requests
from mla.bench.subjects.layer import MlaLayer
from mla.bench.subjects.setting import Setting
from mla.bench.workload.scenario import Scenario
from mla.errors import OutOfMemory, UnsupportedBatch
from mla.parallel.cache import ShardedCache
from mla.parallel.groups import Groups, Traffic
from mla.parallel.layer import ParallelMLA
from mla.parallel.layout import Share
from mla.verify.layer_oracle import Pair, State
from mla.verify.selected import Taken
from mla.verify.verdict import Check

if TYPE_CHECKING:
    from mla.bench.ranks.crew import Crew

T = TypeVar("T")
# The number of the pass in which collectives are clocked: no other pass has it.
CLOCKED = 1 << 22


class RankLayer(MlaLayer):
    """What one rank does of a layer; `load` takes the whole scenario and its inputs."""

    def __init__(
        self,
        setting: Setting,
        state: State,
        name: str,
        ops: str | None,
        groups: Groups,
        meet: Callable[[], None] = lambda: None,
    ) -> None:
        """`meet` returns once every rank has called it."""
        self._groups, self._meet = groups, meet
        self.make_layer = partial(ParallelMLA, groups=groups)
        if groups.layout.dcp > 1:
            self.share = Share(groups.place.dcp, groups.layout.dcp)
            self.make_cache: Any = partial(ShardedCache, share=self.share)  # has what is used of a cache
        super().__init__(replace(setting, weights=None), state, name, ops)  # each packs its own part

    def load(self, scenario: Scenario, inputs: Inputs) -> None:
        if not self._takes:
            self.buffers = buffers(scenario.steps, inputs.hidden[0].nbytes)  # on every rank as many
        self.requests = Requests.of(scenario, self._groups.place.dp, self._groups.layout.dp)
        super().load(self.requests.scenario(scenario), self.requests.inputs(scenario, inputs))

    def extend(self, table_tokens: int = 0) -> Any:
        return self.cache.extend(self._sequences, self.scenario.query_lens)

    def take_now(self, query_lens: Sequence[int], history: Sequence[int], kv_lens: Sequence[int]) -> Taken:
        """Return what the last forward has left here, of the tokens that are this rank's."""
        codec, held = self.setting.codec, self.share.held
        if self.share.world == 1 or codec is None:
            return super().take_now(query_lens, history, kv_lens)
        rows, ends = self.cache.pages[0].flatten(0, 1), zip(self._sequences, history, kv_lens, strict=True)
        new = [self.cache.slots(sequence)[held(past) : held(end)] for sequence, past, end in ends]
        return Taken(tuple(codec.decode(rows.index_select(0, slots).cpu()) for slots in new))

    def left(self, layer: int = 0) -> Left:
        return super().left(layer)._replace(places=None)  # of which rank 0 has its own

    def rank_facts(self, number: int) -> RankFacts:
        """Run a pass in which collectives are clocked, and return what a result says of this rank.

        All ranks must do it together. The samples are left to the caller.
        """
        self.restore(number)
        steps = [Traffic() for _ in range(self.scenario.steps)]
        for index, traffic in enumerate(steps):
            self.before(index)
            self._now_ns()
            self._meet()
            with self._groups.clocked(self._now_ns, traffic):
                self.step(index)
            self.after(index)
        facts = self.facts()
        return RankFacts(
            rank=self._groups.rank,
            samples=[0.0],
            collective_ms=median([traffic.ns / 1e6 for traffic in steps]),  # as of samples
            collective_bytes=sum(traffic.sent for traffic in steps) // len(steps),
            cache_bytes=facts.cache_bytes,
            weight_bytes=facts.weight_bytes,
        )

    def _now_ns(self) -> int:
        self.setting.backend.synchronize()
        return now_ns()

    def make_bench(self) -> None:
        """Prepare forwards on new lengths."""
        self._bench = LayerBench(self, judged=False)  # an oracle of its lengths has no rank

    def run_bench(
        self, lengths: Lengths, count: int, beat: Callable[[], None] = lambda: None
    ) -> list[Sample]:
        """Run `count` forwards on these lengths of all requests, and return what this rank's part took.

        All ranks must do it together.
        """
        mine = Lengths(*(lens[self.requests.part] for lens in lengths))
        self._meet()  # once: a rank that refuses such lengths comes to no further forward
        return self._bench.run(mine, count, beat)


class LeadLayer(Implementation):
    """Has every rank do its part of each forward, from a common start, and checks the outputs of all.

    A sample is that of the slowest rank. Others start their clock when all have met, and rank 0 when its
    runner does, right after that. `Follower` has the other end of every command.
    """

    def __init__(self, setting: Setting, part: RankLayer, crew: Crew) -> None:
        super().__init__(setting)
        self.name = part.name
        self.layer = part  # whose lengths `run` may shrink
        self._part, self._crew = part, crew
        self.held_to_reference = part.held_to_reference
        self._left: list[Left] = []  # of the last pass, by rank
        self._kept: list[list[float]] = []  # of the result's passes, by rank

    # ------------------------------------------------------------------------------------------ passes

    def _all(self, work: Callable[[], T], command: str, *arguments: Any) -> list[T]:
        """Have the others carry out a command, and rank 0 do `work`; return what every rank gave.

        Where one cannot do its part, no rank keeps this layer. Raises what `Crew.attempt` does.
        """
        self._crew.tell(command, *arguments)
        try:
            return self._crew.attempt(self.name, work)
        except (UnsupportedBatch, OutOfMemory):
            self._crew.tell("drop", self.name)
            raise

    def load(self, scenario: Scenario, inputs: Inputs) -> None:
        self.scenario = scenario
        self._kept = self._kept or [[] for _ in range(self._crew.layout.world)]
        self._all(partial(self._part.load, scenario, inputs), "load", scenario.name, self.name, inputs.seed)

    def restore(self, number: int = 0) -> None:
        self.number, self._left = number, []
        self._all(partial(self._part.restore, number), "restore", self.name, number)

    def before(self, index: int) -> None:
        self._index = index
        self._part.before(index)

    def meet(self) -> None:
        with self._crew.awaited(self.name):
            self._crew.tell("forward", self._index)
            self._crew.wait()

    def step(self, index: int) -> None:
        try:
            self._part.step(index)
        except Exception:  # nothing is entered before a forward that is timed
            with self._crew.awaited(self.name), self._crew.blamed():
                raise

    def after(self, index: int) -> None:
        self._crew.tell("after", index)
        self._part.after(index)

    def slowest(self, samples: list[float]) -> list[float]:
        by_rank = self._all(lambda: samples, "times")
        if 1 <= self.number <= self.scenario.rounds:  # a pass of the result
            for kept, times in zip(self._kept, by_rank, strict=True):
                kept += times
        return [max(times) for times in zip(*by_rank, strict=True)]

    def outputs(self) -> Outputs:
        if not self._left:
            self._left = self._all(self._part.left, "part", self.name, "left")
        return self._whole(0)

    def lengths_bench(self) -> LeadLayer | None:
        """Return what runs forwards of all ranks on new lengths, by `run`; None: nothing."""
        if self._crew.layout.dcp > 1:  # whose batches are laid out for the lengths of a pass
            return None
        self._all(self._part.make_bench, "part", self.name, "make_bench")
        return self

    def run(self, lengths: Lengths, count: int, beat: Callable[[], None]) -> list[Sample]:
        """Run `count` forwards of all ranks, and return of each the times of the slowest rank."""
        work = partial(self._part.run_bench, lengths, count, beat)
        self._crew.tell("part", self.name, "run_bench", lengths, count)
        with self._crew.blamed():
            by_rank = self._crew.attempt(self.name, work, together=True)  # the layer stays if one refuses
        return [Sample(*map(max, zip(*samples, strict=True))) for samples in zip(*by_rank, strict=True)]

    # ------------------------------------------------------------------------------------------ checks

    def check(self, checker: Any) -> Check:
        """Check what every rank has: each has the outputs of all heads, of its requests."""
        self.outputs()
        checks = [
            checker.check_pass(self._left_by(copy), self.held_to_reference)
            for copy in range(self._crew.layout.head_parts)  # every rank has the outputs of all heads
        ]
        copy = worst(checks)
        check = checks[copy]
        if check.reason:
            wrong = [place for place, other in enumerate(checks) if other.status == check.status]
            first = self._worst_rank(checker, copy) - copy
            *ranks, last = [str(first + place) for place in wrong]
            blamed = f"on ranks {', '.join(ranks)} and {last}, which hold one sum: any may be at fault"
            check.reason = f"{blamed if ranks else f'on rank {last}'}: {check.reason}"
        return check

    def _worst_rank(self, checker: Any, copy: int) -> int:
        """Return which of the ranks that have one copy of all outputs is farthest from the oracle."""
        ranks, count = self._ranks(copy), self._crew.layout.dp
        rows = [Requests.of(self.scenario, part, count).rows(self.scenario) for part in range(count)]
        far = [0.0] * count
        for _, forward in checker.forwards(self._left_by(copy)):
            error = (forward.actual.cpu().double() - forward.expected).nan_to_num(*[torch.inf] * 3)
            far = [max(old, float(error[part].norm())) for old, part in zip(far, rows, strict=True)]
        return ranks[far.index(max(far))]

    def _ranks(self, copy: int) -> list[int]:
        """Return the ranks that together have one copy of all outputs."""
        return list(range(copy, self._crew.layout.world, self._crew.layout.head_parts))

    def _whole(self, copy: int) -> Outputs:
        """Return the outputs [T, d] of all requests, as one copy of them."""
        parts = [self._left[rank].outputs for rank in self._ranks(copy)]
        return {index: torch.cat([part[index] for part in parts]) for index in sorted(parts[0])}

    def _left_by(self, copy: int) -> Left:
        """Return what a pass left of all requests, as one copy has it."""
        if self.setting.config.index_n_heads:  # a copy is one rank's, which has all requests
            return Left(self.number, self._whole(copy), self._left[copy].taken)
        whole: dict[int, list[Pair]] = {index: [] for index in self._left[0].taken}
        layout, scenario = self._crew.layout, self.scenario
        for rank in self._ranks(copy):
            group = range(rank - rank % layout.dcp, rank - rank % layout.dcp + layout.dcp)
            history = Requests.of(scenario, layout.place(rank).dp, layout.dp).scenario(scenario).history
            for index, latents in whole.items():
                parts = zip(*(self._left[other].taken[index].latents for other in group), strict=True)
                latents += [_merged(pairs, past) for pairs, past in zip(parts, history, strict=True)]
        taken = {index: Taken(tuple(latents)) for index, latents in whole.items()}
        return Left(self.number, self._whole(copy), taken)

    # ------------------------------------------------------------------------------------------- facts

    def spread(self) -> Spread:
        """Run a pass in which collectives are clocked, and return every rank's part."""
        with self._crew.awaited(self.name), self._crew.blamed():
            self._crew.tell("clock", self.name, CLOCKED)
            facts = self._part.rank_facts(CLOCKED)
        by_rank = zip(self._crew.gather(facts), self._kept, strict=True)
        ranks = [msgspec.structs.replace(rank, samples=samples) for rank, samples in by_rank]
        layout, library = str(self._crew.layout), self._crew.library
        lines = self._crew.measure_link(self.setting.device, self.setting.backend.synchronize)
        link = [LinkLine.of(kind, line) for kind, line in lines.items()]
        source = f"measured among the ranks of {layout} over {library}" if link else ""
        return Spread(layout=layout, library=library, ranks=ranks, link=link, link_source=source)

    def facts(self) -> Facts:
        return self._part.facts()


def _merged(shares: Sequence[Pair], past: int) -> Pair:
    """Return kv [t, c] and pe [t, r] of a request's tokens behind `past`: each rank has its share of them."""
    positions = past + torch.arange(sum(len(kv) for kv, _ in shares))
    owned = [positions[Share(rank, len(shares)).owns(positions)] for rank in range(len(shares))]
    order = torch.cat(owned).argsort()
    kv, pe = (torch.cat(parts)[order] for parts in zip(*shares, strict=True))
    return kv, pe


class Follower:
    """What every rank but 0 does of the layer that is measured; a method per command."""

    def __init__(self, request: Request, crew: Crew) -> None:
        self._request, self._crew = request, crew
        self._fixture: Fixture | None = None
        self._layers: dict[str, RankLayer] = {}  # of the present scenario, by implementation
        self._layer: Any = None  # the one that runs
        self._times: list[float] = []  # of this pass

    def follow(self) -> int:
        """Carry out what rank 0 tells until it says "end", and return the exit code that it names."""
        with no_garbage_collection():  # as on rank 0: the slowest rank gives the number
            while True:
                command, *arguments = self._crew.hear()
                if command == "end":
                    return int(arguments[0])
                with self._crew.blamed():
                    getattr(self, command)(*arguments)

    def load(self, scenario: str, implementation: str, fresh: int | None) -> None:
        """Build an implementation's part, with the scenario's weights, history and inputs.

        One that is there already takes `fresh` inputs of this seed, or the scenario's own again.
        """
        plan = next(plan for plan in self._request.scenarios if plan.name == scenario)
        if self._fixture is None or self._fixture.point.name != scenario:
            self._fixture = None  # the last one's weights are gone before there are others
            self.drop()
            self._fixture = make_fixture(plan.setting, plan.point, self._request.state)
        self._crew.attempt(implementation, partial(self._load, self._fixture, plan, implementation, fresh))

    def _load(self, fixture: Fixture, plan: ScenarioPlan, implementation: str, fresh: int | None) -> None:
        inputs = fixture.inputs
        part: Any = self._layers.get(implementation) or fixture.build(implementation)
        part.load(plan.point, inputs if fresh is None else inputs.fresh(fresh))
        self._layers[implementation] = part

    def drop(self, *implementations: str) -> None:
        """Free the parts of these implementations, or of all."""
        for name in implementations or list(self._layers):
            self._layers.pop(name, None)
        self._layer = None
        gc.collect()
        self._request.setting.backend.empty_cache()

    def restore(self, implementation: str, number: int) -> None:
        """Begin a pass."""
        torch.set_num_threads(self._request.setting.threads)  # an op may have changed it
        self._layer, self._times = self._layers[implementation], []
        self._crew.attempt(implementation, partial(self._layer.restore, number))

    def forward(self, index: int) -> None:
        """Prepare a forward, meet the others, and time it."""
        layer, synchronize = self._layer, self._request.setting.backend.synchronize
        with self._crew.awaited(layer.name):
            layer.before(index)
            synchronize()
            self._crew.wait()
            start = now_ns()
            layer.step(index)
            synchronize()
            self._times.append((now_ns() - start) / 1e6)

    def after(self, index: int) -> None:
        """Keep the output of a forward."""
        self._layer.after(index)

    def part(self, implementation: str, method: str, *arguments: Any) -> None:
        """Send what a method of this rank's part gives."""
        self._layer = self._layers[implementation]
        work = partial(getattr(self._layer, method), *arguments)
        self._crew.attempt(implementation, work, together=method == "run_bench")

    def times(self) -> None:
        """Send the milliseconds of this pass's forwards."""
        self._crew.attempt(self._layer.name, lambda: self._times)

    def clock(self, implementation: str, number: int) -> None:
        """Clock the collectives of a pass and the link, and send what the result says of this rank."""
        self._crew.gather(self._layers[implementation].rank_facts(number))
        backend = self._request.setting.backend
        self._crew.measure_link(self._request.setting.device, backend.synchronize)
