"""What every rank but 0 does: carry out commands until the run ends."""

from __future__ import annotations

import contextlib
import gc
from functools import partial
from typing import Any

import torch

from mla.bench.doubts.new_lengths import Lengths
from mla.bench.limits.growth import no_garbage_collection
from mla.bench.plan.request import Request, ScenarioPlan
from mla.bench.ranks.crew import Crew
from mla.bench.ranks.lengths_bench import RankBench
from mla.bench.ranks.part import RankLayer
from mla.bench.subjects.fixture import Fixture, make_fixture
from mla.command import tampering
from mla.command.clock import now_ns
from mla.errors import OutOfMemory, UnsupportedBatch


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
        self._times: list[float] = []  # of this pass

    def load(self, scenario: str, implementation: str, seed: int) -> None:
        """Build an implementation's part, with the scenario's weights, history and inputs."""
        plan = next(one for one in self._request.scenarios if one.name == scenario)
        if self._fixture is None or self._fixture.point.name != scenario:
            self._drop(plan)
        if not self._crew.concerted(implementation, partial(self._load, plan, implementation, seed)):
            self._layers.pop(implementation, None)
            gc.collect()
            self._request.setting.backend.empty_cache()

    def _load(self, plan: ScenarioPlan, implementation: str, seed: int) -> None:
        assert self._fixture is not None
        inputs = self._fixture.inputs()
        part: Any = self._fixture.build(implementation)
        part.load_alike(plan.point, inputs, seed)
        self._layers[implementation] = part

    def _drop(self, plan: ScenarioPlan) -> None:
        self._layers, self._layer = {}, None
        gc.collect()
        self._fixture = make_fixture(plan.setting, plan.point, self._request.state)
        self._request.setting.backend.empty_cache()

    def restore(self, implementation: str, number: int) -> None:
        """Begin a pass."""
        torch.set_num_threads(self._request.setting.threads)  # an op may have changed it
        self._layer, self._times = self._layers[implementation], []
        self._crew.concerted(implementation, partial(self._layer.restore, number))

    def forward(self, index: int) -> None:
        """Prepare a forward, meet the others, and time it."""
        layer, synchronize = self._layer, self._request.setting.backend.synchronize
        layer.before(index)
        synchronize()
        self._crew.wait()
        start = now_ns()
        try:
            layer.step(index)
            synchronize()
        except Exception as error:
            if self._crew.alike(error, layer.name) is None:
                raise
            return  # rank 0 knows
        self._times.append((now_ns() - start) / 1e6)

    def bench(self, implementation: str) -> None:
        """Prepare forwards on new lengths."""
        self._layer = self._layers[implementation]
        self._bench = RankBench(self._layer, self._crew.wait)

    def run_lengths(self, lengths: Lengths, count: int) -> None:
        """Run so many forwards on these lengths of all requests, and send what they took."""
        with contextlib.suppress(UnsupportedBatch, OutOfMemory):  # rank 0 knows
            self._crew.attempt(self._layer.name, partial(self._bench.run, lengths, count))

    def feed(self, implementation: str, seed: int | None, count: int) -> None:
        """Give the forwards of a plain pass so many new inputs; without a seed, the scenario's again."""
        self._layers[implementation].feed(seed, count)

    def idle(self, index: int) -> None:
        """Prepare a forward that is not run, and meet the others."""
        self._layer.before(index)
        self._crew.wait()

    def after(self, index: int) -> None:
        """Keep the output of a forward."""
        self._layer.after(index)

    def times(self) -> None:
        """Send the milliseconds of this pass's forwards."""
        self._crew.gather(self._times)

    def collect(self) -> None:
        """Send the outputs of this pass."""
        self._layer.collect()
        self._crew.gather(self._layer.compared())

    def clock(self, implementation: str, number: int) -> None:
        """Clock the collectives of a pass and the link, and send what the result says of this rank."""
        facts = self._layers[implementation].facts(number, self._crew.wait)
        self._crew.gather((facts, tampering.found()))
        backend = self._request.setting.backend
        self._crew.measure_link(self._request.setting.device, backend.synchronize)
