"""Make the lanes of an implementation: its graphs, its timers and what sweeps the caches."""

from __future__ import annotations

from mla.bench.measure.cold_cache import Sweep
from mla.bench.measure.passes import Forwards, Lane
from mla.bench.measure.samples import Measured, Series
from mla.bench.measure.variants import HEADLINE, Kind, LaneError, Lanes, steps
from mla.bench.subjects.base import Implementation
from mla.bench.subjects.graphs import Captured, NoGraph, ReplayAlone
from mla.bench.workload.scenario import Scenario
from mla.verify.verdict import Check
from mla_backends.api import Backend, Timer


class Equipment:
    """What one scenario is timed with on one backend."""

    def __init__(self, backend: Backend, lanes: Lanes, scenario: Scenario) -> None:
        self._backend, self._lanes, self._scenario = backend, lanes, scenario
        self._sweep = Sweep(backend) if any(kind.cache == "cold" for kind in lanes.kinds) else None

    def lanes(self, one: Implementation, measured: Measured, first: bool) -> list[Lane]:
        """Return the lanes of an implementation that has run a whole pass, and note each in `measured`.

        A lane that cannot be had is noted with its reason. Raises `LaneError` if that is a graph that was
        asked for by name, of the first implementation.
        """
        captured = self._captured(one, first)
        found = [self._lane(one, one, measured.headline)]
        for kind in self._lanes.kinds:
            if kind == HEADLINE:
                continue
            series = Series(kind, Check(status="not run"))
            measured.others.append(series)
            if kind.mode == "eager":
                found.append(self._lane(one, one, series))
            elif isinstance(captured, Captured):
                series.method = captured.method
                alone = kind.clock == "device"
                found.append(self._lane(one, ReplayAlone(captured) if alone else captured, series))
            else:
                series.check.reason = captured
        return found

    def _captured(self, one: Implementation, first: bool) -> Captured | str:
        """Return the captured forwards, or why there are none."""
        if not any(kind.mode == "graph" for kind in self._lanes.kinds):
            return ""
        try:
            return one.captured()
        except NoGraph as error:
            if first and self._lanes.graphs_by_name:
                where = f"{self._scenario.name}, {one.name}"
                raise LaneError(f"--mode graph: {where} cannot be replayed from graphs: {error}.") from error
            return str(error)

    def _lane(self, one: Implementation, forwards: Forwards, series: Series) -> Lane:
        plan = steps(series.kind, self._scenario)
        timer = self._timer(series.kind)
        sweep = self._sweep if series.kind.cache == "cold" else None
        parts = [getattr(forwards, "method", ""), sweep.method() if sweep else "", plan.method()]
        series.clock, series.method = timer.clock, "; ".join(part for part in parts if part)
        return Lane(one, forwards, timer, sweep, plan, series)

    def _timer(self, kind: Kind) -> Timer:
        timer = self._backend.device_timer() if kind.clock == "device" else self._backend.timer()
        if timer is None:
            raise LaneError(f"backend '{self._backend.name}' has lost its clock: device_timer() is None.")
        return timer
