"""What every rank but 0 does: carry out commands until the run ends."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from time import perf_counter_ns as now_ns
from typing import Any

import torch

from mla.bench.limits.microbench import no_garbage_collection
from mla.bench.measure.evidence import Lengths
from mla.bench.plan.request import Request, ScenarioPlan
from mla.bench.ranks.crew import Crew
from mla.bench.ranks.errors import Failure
from mla.bench.ranks.layers import RankBench, RankLayer
from mla.bench.subjects.fixture import Fixture, make_fixture


def follow(request: Request, crew: Crew) -> int:
    """Carry out what rank 0 tells until it says "end", and return the exit code that it names."""
    follower = _Follower(request, crew)
    with no_garbage_collection():  # as on rank 0: the slowest rank gives the number
        while True:
            name, *arguments = crew.hear()
            if name == "end":
                (code,) = arguments
                return int(code)
            with crew.blamed():
                getattr(follower, name)(*arguments)


class _Follower:
    """This rank's part of the layer that is measured; a method per command."""

    def __init__(self, request: Request, crew: Crew) -> None:
        self._request, self._crew = request, crew
        self._fixture: Fixture | None = None
        self._layers: dict[str, RankLayer] = {}  # of the present scenario, by implementation
        self._layer: Any = None  # the one that runs
        self._bench: RankBench | None = None  # of it
        self._failure: Failure | None = None  # of a forward of it, until rank 0 asks
        self._times: list[float] = []  # of this pass

    def load(self, scenario: str, implementation: str, seed: int, fresh: int | None) -> None:
        """Build an implementation's part, with the scenario's weights, history and inputs.

        One that is there already takes `fresh` inputs of this seed, or the scenario's own again.
        """
        plan = next(one for one in self._request.scenarios if one.name == scenario)
        if self._fixture is None or self._fixture.point.name != scenario:
            self._renew(plan)
        self._failure = None
        self._concerted(implementation, partial(self._load, plan, implementation, seed, fresh))

    def _concerted(self, implementation: str, work: Callable[[], object]) -> None:
        """Do this rank's part of a preparation; where any rank's failed, no rank keeps the layer."""
        failed, self._failure = self._failure, None
        if not self._crew.concerted(implementation, work, failed):
            self.drop(implementation)

    def _turn_to(self, implementation: str) -> Any:
        """Return the layer that runs from now on."""
        layer = self._layers[implementation]
        if layer is not self._layer:
            self._layer, self._failure = layer, None
        return layer

    def _load(self, plan: ScenarioPlan, implementation: str, seed: int, fresh: int | None) -> None:
        assert self._fixture is not None
        inputs = self._fixture.inputs()
        part: Any = self._layers.get(implementation) or self._fixture.build(implementation)
        part.load_alike(plan.point, inputs if fresh is None else inputs.fresh(fresh), seed)
        self._layers[implementation] = part

    def _renew(self, plan: ScenarioPlan) -> None:
        self._fixture = None  # the last one's weights are gone before there are others
        self.drop()
        self._fixture = make_fixture(plan.setting, plan.point, self._request.state)

    def drop(self, *implementations: str) -> None:
        """Free the parts of these implementations, or of all."""
        for name in implementations or list(self._layers):
            self._layers.pop(name, None)
        self._layer = self._bench = self._failure = None
        gc.collect()
        self._request.setting.backend.empty_cache()

    def restore(self, implementation: str, number: int) -> None:
        """Begin a pass."""
        torch.set_num_threads(self._request.setting.threads)  # an op may have changed it
        layer, self._times = self._turn_to(implementation), []
        self._concerted(implementation, partial(layer.restore, number))

    def forward(self, index: int) -> None:
        """Prepare a forward, meet the others, and time it; after one that failed, only meet them."""
        if self._failure is not None:
            self._crew.wait()
            return
        layer, synchronize = self._layer, self._request.setting.backend.synchronize
        layer.before(index)
        synchronize()
        self._crew.wait()
        start = now_ns()
        try:
            layer.step(index)
            synchronize()
        except Exception as error:
            self._failure = self._crew.alike(error, layer.name)
            if self._failure is None:
                raise
            return
        self._times.append((now_ns() - start) / 1e6)

    def bench(self, implementation: str) -> None:
        """Prepare forwards on new lengths."""
        self._turn_to(implementation)
        self._concerted(implementation, self._make_bench)

    def _make_bench(self) -> None:
        self._bench = RankBench(self._layer, self._crew.wait)

    def run_lengths(self, lengths: Lengths, count: int) -> None:
        """Run so many forwards on these lengths of all requests, and send what they took."""
        assert self._bench is not None
        self._crew.attempt(self._layer.name, partial(self._bench.run, lengths, count))

    def after(self, index: int) -> None:
        """Keep the output of a forward."""
        if self._failure is None:
            self._layer.after(index)

    def times(self) -> None:
        """Send the milliseconds of this pass's forwards, or why one failed."""
        self._crew.parts(self._failure or self._times)

    def outputs(self) -> None:
        """Send the outputs of this pass, or why a forward failed."""
        self._crew.parts(self._failure or self._layer.outputs())

    def clock(self, implementation: str, number: int) -> None:
        """Clock the collectives of a pass and the link, and send what the result says of this rank."""
        facts = self._layers[implementation].rank_facts(number, self._crew.wait)
        self._crew.gather(facts)
        backend = self._request.setting.backend
        self._crew.measure_link(self._request.setting.device, backend.synchronize)
