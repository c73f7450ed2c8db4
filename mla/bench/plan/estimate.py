"""How long a run will take, roughly, from what it has to compute and what the device reaches.

Good for deciding what to start and for a progress bar, no more: implementations differ in how far they stay
from the limit, and what else runs on the machine is not known.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from mla.bench import results
from mla.bench.limits.roofline import RooflineModel
from mla.bench.measure.variants import Variant, forwards
from mla.bench.plan.request import Request, ScenarioPlan
from mla.bench.subjects.setting import Setting
from mla.bench.workload.implementations import parse_one

# Implementation -> share of the device's limit that it is assumed to reach.
SHARES = {"mla": 0.5, "mla-reference": 0.2, "transformers": 0.05, "transformers-eager": 0.05}
# Seconds of a forward that no limit explains: launches, and Python between them.
OVERHEAD = 5e-4
# Seconds per weight: drawing it, and laying it out.
DRAWING, PACKING = 2e-8, 5e-9
# Assumed where nothing is measured: right in proportion is enough for a progress bar.
NOMINAL_FLOPS, NOMINAL_BANDWIDTH, NOMINAL_FLOAT64 = 1e12, 3e10, 3e10


class Estimator:
    """Estimates scenarios of one run; with `measured` limits, or with nominal ones that cost no time."""

    def __init__(self, variants: Sequence[Variant], measured: bool) -> None:
        self._variants, self.measured = variants, measured
        self._float64 = _float64_rate() if measured else NOMINAL_FLOAT64

    def seconds(self, scenario: ScenarioPlan, names: Sequence[str]) -> float:
        """Return the seconds of a scenario: its oracle, and every forward of these implementations."""
        return self.preparation(scenario, names) + sum(
            forwards(self._variants, scenario.point) * self.forward(scenario, name) for name in names
        )

    def preparation(self, scenario: ScenarioPlan, names: Sequence[str]) -> float:
        """Return the seconds for weights and the float64 oracle."""
        needs = scenario.needs
        return needs.oracle_flops / self._float64 + needs.parameters * (DRAWING + PACKING * len(names))

    def forward(self, scenario: ScenarioPlan, name: str) -> float:
        """Return the seconds of one forward."""
        floor = self.floor(scenario.setting, scenario.needs.forward)
        return floor / SHARES.get(parse_one(name).base, min(SHARES.values())) + OVERHEAD

    def floor(self, setting: Setting, work: results.Cost) -> float:
        """Return the seconds below which the device cannot do some work."""
        flops, bandwidth = NOMINAL_FLOPS, NOMINAL_BANDWIDTH
        if self.measured:
            ceilings = RooflineModel(setting)
            flops = ceilings.flops().value
            # Sizes of a factor of two share a measurement, or a grid would measure for minutes.
            bandwidth = ceilings.bandwidth(1 << work.bytes.bit_length()).value
        return max(work.flops / flops, work.bytes / bandwidth)


def nominal(request: Request) -> Estimator:
    """Return an estimator that measures nothing."""
    return Estimator(request.variants.timed, measured=False)


def measured(request: Request) -> Estimator:
    """Return an estimator with measured limits; nominal ones for a device that cannot be measured."""
    estimator = Estimator(request.variants.timed, measured=True)
    try:
        estimator.floor(request.setting, results.Cost(flops=1, bytes=1))
    except Exception:  # noqa: BLE001  # whatever a plugin raises must not cost the run
        return nominal(request)
    return estimator


def nominal_seconds(request: Request) -> float:
    """Return the length of a progress bar, in nominal seconds."""
    estimator = nominal(request)
    return sum(estimator.seconds(scenario, request.implementations) for scenario in request.scenarios)


def _float64_rate(side: int = 512) -> float:
    """Return FLOP per second of the host's float64 products, the oracle's main work."""
    x = torch.ones(side, side, dtype=torch.float64)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        torch.mm(x, x)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
