"""Set up the timing of an implementation: its graphs, its timers and the cache flush.

A flush reads and writes a buffer of twice the last-level cache on the device, and is finished before timing
starts. That evicts weights, latents, hidden states and tables from every data cache on the way to memory. It
does not empty instruction caches, branch predictors or TLBs, and leaves an accelerator's host alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from mla.bench.measure.passes import PassRunner
from mla.bench.measure.samples import Measurement, Samples
from mla.bench.measure.variants import HEADLINE, VariantError, Variants, steps
from mla.bench.subjects import graphs
from mla.bench.subjects.base import Implementation
from mla.bench.subjects.graphs import CapturedForwards, NoGraph, ReplayAlone
from mla.bench.workload.scenario import Scenario
from mla.text import size
from mla.verify.verdict import Check
from mla_backends import host
from mla_backends.api import Backend, Timer

# Size of the buffer relative to the cache: replacement is not strictly oldest first.
TIMES = 2
# Size of the buffer in bytes if the size of the cache is unknown, or declared below what any device has.
FALLBACK, INCREDIBLE = 256 << 20, 1 << 20
# Bounds of the buffer in bytes: flushing a whole machine's shared cache would take longer than the forwards.
LEAST, MOST = 64 << 20, 512 << 20


class Sweep(NamedTuple):
    """How much is read and written, and why so much."""

    bytes: int
    reason: str


def sweep(backend: Backend) -> Sweep:
    """Return what flushes the last-level cache of a backend's device.

    Its declared size is held against what is known from elsewhere: the host's own caches, where it is the
    device, and what no device falls short of.
    """
    declared, own = backend.device_info().cache_bytes, None
    if backend.device is not None and backend.device.type == "cpu":
        own = host.last_level_cache()
    if declared is not None and declared < INCREDIBLE and own is None:
        return Sweep(FALLBACK, f"as {_size(declared)} cannot be the last-level cache that was declared")
    if declared is None and own is None:
        return Sweep(FALLBACK, "for a last-level cache of unknown size")
    cache = max(declared or 0, own or 0)
    reason = f"for a last-level cache of {_size(cache)}"
    if own and declared is not None and declared < own:
        reason += f" (as the host reports; the backend declares {_size(declared)})"
    if TIMES * cache > MOST:
        reason += ": less than twice its size, so that some of it may stay warm"
    return Sweep(min(max(TIMES * cache, LEAST), MOST), reason)


def _size(count: int) -> str:
    return size(count, MiB="g") if count >= INCREDIBLE else f"{count} bytes"


class CacheFlush:
    """A buffer on the backend's device; calling the object flushes the cache and waits for the device."""

    def __init__(self, backend: Backend) -> None:
        self.bytes, self._reason = sweep(backend)
        self._buffer = torch.zeros(self.bytes // 4, dtype=torch.float32, device=backend.device)

    def __call__(self) -> None:
        """Flush. Nothing of the backend is called: it could warm the cache again."""
        self._buffer.add_(1)
        self._buffer[-1].to("cpu")  # waits for the sweep, in the order of the stream

    def method(self) -> str:
        """Return how the cache is flushed, for the result."""
        return f"{size(self.bytes, MiB='g')} read and written before every timed forward, {self._reason}"


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

    def _runner(self, one: Implementation, forwards: Any, samples: Samples) -> PassRunner:
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
