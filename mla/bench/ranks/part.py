"""One rank's part of our layer, as an implementation that can be driven forward by forward.

`RankLayer` is that of this process; `SimulatedPart` one of many that take turns on one device.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from time import perf_counter_ns as now_ns
from typing import Any

import torch

from mla.bench.results.schema import RankFacts
from mla.bench.results.stats import median
from mla.bench.subjects.base import Shelf, buffers, poison
from mla.bench.subjects.inputs import Inputs, Requests
from mla.bench.subjects.layer import MlaLayer
from mla.bench.subjects.setting import SPARE_PAGES, Setting
from mla.bench.workload.scenario import Scenario
from mla.cache import LatentCache
from mla.layer.attention import MLA
from mla.parallel.cache import ShardedCache
from mla.parallel.groups import Groups, SimulatedGroups, Traffic
from mla.parallel.layer import ParallelMLA
from mla.parallel.layout import Share
from mla.verify.layer_oracle import State
from mla.verify.places import Places

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
        self._extended = super().extend(table_tokens)
        return self._extended

    @property
    def _present_batch(self) -> Any:
        """The batch of the last forward."""
        return self.batch if self.scenario.mode == "prefill" else self._extended

    def begin_meeting(self) -> None:
        """Make the batch of a forward that all ranks run."""
        poison(self.out)
        if self.scenario.mode == "decode":
            self.extend()

    def meet_ranks(self) -> None:
        """Run the forward that was begun, as far as other ranks let it."""
        self.forward(self._present_batch, self.x, self.out)

    def undo(self) -> None:
        """Go back to before the last forward, whose results are overwritten, and receive again."""
        batch = self._present_batch
        self.clear_new(batch)
        if self.scenario.mode == "decode":
            grown = list(zip(self._sequences, self.scenario.query_lens, strict=True))
            for sequence, new in reversed(grown):  # the free list, and so the next pages, are as before
                self._cache.truncate(sequence, self._cache.length(sequence) - new)
        poison(self.out)
        self.groups.receive_again()
