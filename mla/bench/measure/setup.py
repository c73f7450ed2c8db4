"""Set up the timing of an implementation: its graphs, its timers and the cache flush."""

from __future__ import annotations

from mla.bench.measure.cold_cache import CacheFlush
from mla.bench.measure.passes import Forwards, PassRunner
from mla.bench.measure.samples import Measurement, Samples
from mla.bench.measure.variants import HEADLINE, VariantError, Variants, steps
from mla.bench.subjects import graphs
from mla.bench.subjects.base import Implementation
from mla.bench.subjects.graphs import CapturedForwards, NoGraph, ReplayAlone
from mla.bench.workload.scenario import Scenario
from mla.verify.verdict import Check
from mla_backends.api import Backend, Timer


class Setup:
    """What one scenario is timed with on one backend."""

    def __init__(self, backend: Backend, variants: Variants, scenario: Scenario) -> None:
        self._backend, self._variants, self._scenario = backend, variants, scenario
        self.asked = variants.asked
        cold = any(variant.cache == "cold" for variant in variants.timed)
        self._flush = CacheFlush(backend) if cold else None

    def headline(self, one: Implementation, measurement: Measurement) -> PassRunner:
        """Return the runner of an implementation's headline."""
        return self._runner(one, one, measurement.headline)

    def others(self, one: Implementation, measurement: Measurement, first: bool) -> list[PassRunner]:
        """Return a runner per further variant of an implementation that has run a whole pass.

        All variants are noted in `measurement`, unavailable ones with the reason. Raises `VariantError` if
        graphs are required and `one`, the first implementation, has none.
        """
        captured = self._captured(one, first)
        found = []
        for variant in self._variants.timed:
            if variant == HEADLINE:
                continue
            samples = Samples(variant, Check(status="not run"))
            measurement.others.append(samples)
            if variant.mode == "eager":
                found.append(self._runner(one, one, samples))
            elif isinstance(captured, CapturedForwards):
                alone = variant.clock == "device"
                found.append(self._runner(one, ReplayAlone(captured) if alone else captured, samples))
            else:
                samples.check.reason = captured
        return found

    def _captured(self, one: Implementation, first: bool) -> CapturedForwards | str:
        """Return the captured forwards, or why there are none."""
        if not any(variant.mode == "graph" for variant in self._variants.timed):
            return ""
        try:
            return graphs.captured(one, self._scenario)
        except NoGraph as error:
            if first and self._variants.graphs_required:
                where = f"{self._scenario.name}, {one.name}"
                raise VariantError(
                    f"--mode graph: {where} cannot be replayed from graphs: {error}."
                ) from error
            return str(error)

    def _runner(self, one: Implementation, forwards: Forwards, samples: Samples) -> PassRunner:
        variant, backend = samples.variant, self._backend
        plan = steps(variant, self._scenario)
        timer = self._device_timer() if variant.clock == "device" else None
        flush = self._flush if variant.cache == "cold" else None
        parts = [getattr(forwards, "method", ""), flush.method() if flush else "", plan.method()]
        samples.clock = timer.clock if timer else "host"
        samples.method = "; ".join(part for part in parts if part)
        return PassRunner(one, forwards, backend.synchronize, timer, flush, plan, samples)

    def _device_timer(self) -> Timer:
        timer = self._backend.device_timer()
        if timer is None:
            raise VariantError(
                f"backend '{self._backend.name}' no longer has a device timer: device_timer() returned None."
            )
        return timer
