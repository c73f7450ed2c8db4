"""A layer over several ranks: `RankLayer` is one rank's part, and `LeadLayer` on rank 0 the whole.

`RankBench` and `LeadBench` are the same for forwards on new lengths.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from time import perf_counter_ns as now_ns
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import torch

from mla.bench.measure.evidence import LayerBench, Lengths, Sample
from mla.bench.ranks.errors import Failure, RanksError, failure
from mla.bench.results.schema import LinkLine, RankFacts, Spread
from mla.bench.results.stats import median
from mla.bench.subjects.base import Facts, Implementation, LayerChecker, Outputs, buffers
from mla.bench.subjects.inputs import Inputs, Requests
from mla.bench.subjects.layer import MlaLayer
from mla.bench.subjects.setting import SPARE_PAGES, Setting
from mla.bench.workload.scenario import Scenario
from mla.cache import LatentCache
from mla.errors import OutOfMemory, UnsupportedBatch
from mla.layer.attention import MLA
from mla.parallel.cache import ShardedCache
from mla.parallel.groups import Groups, Traffic
from mla.parallel.layer import ParallelMLA
from mla.parallel.layout import Share
from mla.verify.layer_oracle import State
from mla.verify.places import Places
from mla.verify.verdict import Check

if TYPE_CHECKING:
    from mla.bench.ranks.crew import Crew

# Bound before any plugin loads.
_random = random.SystemRandom()

T = TypeVar("T")
# The number of the pass in which collectives are clocked: no other pass has it.
CLOCKED = 1 << 22


class RankLayer(MlaLayer):
    """What one rank does of a layer; `load` takes the whole scenario and its inputs."""

    def __init__(self, setting: Setting, state: State, name: str, ops: str | None, groups: Groups) -> None:
        self._groups = groups
        super().__init__(setting, state, name, ops)

    def _make_layer(self, ops: str | None, index: int) -> MLA:
        setting = self.setting
        return ParallelMLA(
            setting.config,
            self._groups,
            backend=setting.backend,
            dtype=setting.dtype,
            attention=setting.attention,
            ops=ops or setting.ops,
            overrides=dict(setting.overrides),
        )

    def load(self, scenario: Scenario, inputs: Inputs) -> None:
        self.buffers = buffers(scenario.steps, inputs.hidden[0].nbytes)  # on every rank as many
        self.requests = Requests.of(scenario, self._groups.place.dp, self._groups.layout.dp)
        super().load(self.requests.scenario(scenario), self.requests.inputs(scenario, inputs))

    def load_alike(self, scenario: Scenario, inputs: Inputs, seed: int) -> None:
        """Load, and keep the outputs of the same forwards as every rank that is given this seed."""
        self.load(scenario, inputs)
        self._shelf.draw_from(random.Random(seed))

    def _make_cache(self, scenario: Scenario) -> LatentCache:
        layout = self._groups.layout
        if layout.dcp == 1:
            return super()._make_cache(scenario)
        size, share = self.setting.page_size, Share(self._groups.place.dcp, layout.dcp)
        pages = sum(-(-share.first(length) // size) for length in scenario.final_lens) + SPARE_PAGES
        cache: Any = ShardedCache(
            self.setting.config,
            share,
            max_tokens=pages * size * layout.dcp,
            page_size=size,
            device=self.setting.device,
            dtype=self.setting.dtype,
            shuffle=self.setting.seed,
        )
        return cache  # has what this class uses of one

    def extend(self, table_tokens: int = 0) -> Any:
        return self._cache.extend(self._sequences, self.scenario.query_lens)

    def places(self, step: int) -> Places:
        return Places.new_tokens(self.scenario.query_lens, self.scenario.kv_lens(step))

    def rank_facts(self, number: int, meet: Callable[[], None]) -> RankFacts:
        """Run a pass in which collectives are clocked, and return what a result says of this rank.

        All ranks must do it together, and `meet` before every forward. The samples are left to the caller.
        """
        self.restore(number)
        steps = [Traffic() for _ in range(self.scenario.steps)]
        for index, traffic in enumerate(steps):
            self.before(index)
            self._now_ns()
            meet()
            with self._groups.clocked(self._now_ns, traffic):
                self.step(index)
            self.after(index)
        facts = self.facts()
        return RankFacts(
            rank=self._groups.rank,
            samples=[0.0],
            collective_ms=median([one.ns / 1e6 for one in steps]),  # as of samples
            collective_bytes=sum(one.sent for one in steps) // len(steps),
            cache_bytes=facts.cache_bytes,
            weight_bytes=facts.weight_bytes,
        )

    def _now_ns(self) -> int:
        self.setting.backend.synchronize()
        return now_ns()


class RankBench:
    """One rank's part of it. Every rank must make one, and run it, at the same time."""

    def __init__(self, part: RankLayer, meet: Callable[[], None]) -> None:
        """`meet` returns once every rank has called it."""
        self.layer, self._meet = part, meet
        self._bench = LayerBench(part, judged=False)  # an oracle of its lengths has no rank

    def run(self, lengths: Lengths, count: int, beat: Callable[[], None] = lambda: None) -> list[Sample]:
        """Run `count` forwards on these lengths of all requests, and return what this rank's part took."""
        first, stop = self.layer.requests.first, self.layer.requests.stop
        own = Lengths(lengths.query_lens[first:stop], lengths.kv_lens[first:stop])
        self._meet()  # once: a rank that refuses such lengths comes to no further forward
        return self._bench.run(own, count, beat)


class LeadBench:
    """The bench of all ranks together (as `mla.bench.measure.evidence.LayerBench`): the slowest counts."""

    def __init__(self, lead: LeadLayer, own: RankBench) -> None:
        self._lead, self._own = lead, own
        self.layer = own.layer

    def run(self, lengths: Lengths, count: int, beat: Callable[[], None]) -> list[Sample]:
        """Return of each forward the times of the slowest rank."""
        by_rank = self._lead.run_lengths(self._own, lengths, count, beat)
        return [Sample(*map(max, zip(*samples, strict=True))) for samples in zip(*by_rank, strict=True)]


class LeadLayer(Implementation):
    """Has every rank do its part of each forward, from a common start, and checks the outputs of all.

    A sample is that of the slowest rank. Others start their clock when all have met, and rank 0 when its
    runner does, right after that.
    """

    def __init__(self, setting: Setting, part: RankLayer, crew: Crew) -> None:
        super().__init__(setting)
        self.name = part.name
        self._part, self._crew = part, crew
        self.held_to_reference = part.held_to_reference
        self._outputs: list[Outputs] = []  # of the last pass, by rank
        self._kept: list[list[float]] = []  # of the result's passes, by rank

    # ------------------------------------------------------------------------------------------ passes

    def load(self, scenario: Scenario, inputs: Inputs) -> None:
        self.scenario = scenario
        self._kept = self._kept or [[] for _ in range(self._crew.layout.world)]
        seed = _random.getrandbits(63)
        self._crew.tell("load", scenario.name, self.name, seed, inputs.seed)
        self._crew.concerted(self.name, partial(self._part.load_alike, scenario, inputs, seed))

    def restore(self, number: int = 0) -> None:
        self._number, self._outputs = number, []
        self._crew.tell("restore", self.name, number)
        self._crew.concerted(self.name, partial(self._part.restore, number))

    def before(self, index: int) -> None:
        self._index = index
        self._part.before(index)

    def meet(self) -> None:
        with self._awaited():
            self._crew.tell("forward", self._index)
            self._crew.wait()

    def step(self, index: int) -> None:
        try:
            self._part.step(index)
        except Exception as error:  # nothing is entered before a forward that is timed
            if (own := self._crew.alike(error, self.name)) is None:
                with self._awaited(), self._crew.blamed():
                    raise
            self._crew.tell("times")
            self._of_all(own)  # raises what it is on all ranks

    def after(self, index: int) -> None:
        self._crew.tell("after", index)
        self._part.after(index)

    def slowest(self, samples: list[float]) -> list[float]:
        self._crew.tell("times")
        last = self._of_all(samples)
        if 1 <= self._number <= self.scenario.rounds:  # a pass of the result
            for kept, times in zip(self._kept, last, strict=True):
                kept += times
        return [max(times) for times in zip(*last, strict=True)]

    def outputs(self) -> Outputs:
        if not self._outputs:
            with self._awaited():
                self._crew.tell("outputs")
                mine = self._part.outputs()
            self._outputs = self._of_all(mine)
        return self._whole(0)

    def _of_all(self, mine: T | Failure) -> list[T]:
        """Return what every rank gave; where one gave a failure instead, no rank keeps this layer."""
        try:
            return self._crew.parts(mine)
        except (UnsupportedBatch, OutOfMemory):
            self._crew.tell("drop", self.name)
            raise

    def lengths_bench(self) -> LeadBench | None:
        """Return what runs forwards of all ranks on new lengths; None: nothing."""
        if self._crew.layout.dcp > 1:  # whose batches are laid out for the lengths of a pass
            return None
        self._crew.tell("bench", self.name)
        made: list[RankBench] = []
        self._crew.concerted(self.name, lambda: made.append(RankBench(self._part, self._crew.wait)))
        return LeadBench(self, made[0])

    def run_lengths(
        self, bench: RankBench, lengths: Lengths, count: int, beat: Callable[[], None]
    ) -> list[list[Sample]]:
        """Have all ranks run forwards on new lengths, and return what their parts took, by rank."""
        self._crew.tell("run_lengths", lengths, count)
        with self._crew.blamed():
            return self._crew.attempt(self.name, partial(bench.run, lengths, count, beat))

    @contextmanager
    def _awaited(self) -> Iterator[None]:
        """End the run, on all ranks, if this one fails in the block: the others wait for it.

        Raises `RanksError` for what would cost one device no more than the case.
        """
        try:
            yield
        except Exception as error:
            if (own := failure(error, self.name)) is not None:
                raise RanksError(f"rank 0: {own.sentence}", common=True) from error
            raise

    # ------------------------------------------------------------------------------------------ checks

    def check(self, checker: LayerChecker) -> Check:
        """Check what every rank has: each has the outputs of all heads, of its requests."""
        self.outputs()
        found = [
            checker.check_pass(self._whole(copy), self._number, self.held_to_reference)
            for copy in range(self._copies())
        ]
        worst = max(range(len(found)), key=lambda copy: _badness(found[copy]))
        if found[worst].reason:
            wrong = [copy for copy, one in enumerate(found) if one.status == found[worst].status]
            found[worst].reason = f"{self._blamed(checker, worst, wrong)}: {found[worst].reason}"
        return found[worst]

    def _blamed(self, checker: LayerChecker, worst: int, wrong: Sequence[int]) -> str:
        """Say on which ranks outputs are wrong; a wrong part of a sum cannot be told from the others."""
        rank = self._worst_rank(checker, worst)
        if len(wrong) == 1:
            return f"on rank {rank}"
        ranks = ", ".join(str(rank - worst + copy) for copy in wrong[:-1])
        return f"on ranks {ranks} and {rank - worst + wrong[-1]}, which hold one sum: any may be at fault"

    def _worst_rank(self, checker: LayerChecker, copy: int) -> int:
        """Return which of the ranks that have one copy of all outputs is farthest from the oracle."""
        ranks, count = self._ranks(copy), self._crew.layout.dp
        rows = [Requests.of(self.scenario, part, count).rows(self.scenario) for part in range(count)]
        far = [0.0] * count
        for _, forward in checker.forwards(self._whole(copy), self._number):
            error = (forward.found.cpu().double() - forward.expected).nan_to_num(*[torch.inf] * 3)
            far = [max(old, float(error[part].norm())) for old, part in zip(far, rows, strict=True)]
        return ranks[far.index(max(far))]

    def _copies(self) -> int:
        """Return how often each output is there: every rank has those of all heads."""
        return self._crew.layout.head_parts

    def _ranks(self, copy: int) -> list[int]:
        """Return the ranks that together have one copy of all outputs."""
        return list(range(copy, self._crew.layout.world, self._crew.layout.head_parts))

    def _whole(self, copy: int) -> Outputs:
        """Return the outputs [T, d] of all requests, as one copy of them."""
        parts = [self._outputs[rank] for rank in self._ranks(copy)]
        common = sorted(set.intersection(*map(set, parts)))
        if any(parts) and not common:
            raise RuntimeError("ranks kept the outputs of different forwards, so that none can be checked.")
        return {index: torch.cat([part[index] for part in parts]) for index in common}

    # ------------------------------------------------------------------------------------------- facts

    def spread(self) -> Spread:
        """Run a pass in which collectives are clocked, and return every rank's part."""
        with self._awaited(), self._crew.blamed():
            self._crew.tell("clock", self.name, CLOCKED)
            own = self._part.rank_facts(CLOCKED, self._crew.wait)
        found = self._crew.gather(own)
        ranks = [
            msgspec.structs.replace(one, samples=samples)
            for one, samples in zip(found, self._kept, strict=True)
        ]
        layout, library = str(self._crew.layout), self._crew.library
        lines = self._crew.measure_link(self.setting.device, self.setting.backend.synchronize)
        link = [LinkLine.of(kind, line) for kind, line in lines.items()]
        source = f"measured among the ranks of {layout} over {library}" if link else ""
        return Spread(layout=layout, library=library, ranks=ranks, link=link, link_source=source)

    def facts(self) -> Facts:
        return self._part.facts()

    def replace_ops(self, replace: Callable[[str, Any], Any]) -> None:
        """Put `replace(role, op)` in place of every op of rank 0; called before `load`."""
        self._part.replace_ops(replace)


def _badness(check: Check) -> tuple[bool, float]:
    return check.status != "ok", check.error_ratio if check.error_ratio is not None else float("inf")
