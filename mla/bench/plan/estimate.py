"""About how long a run will take, from what it has to compute and what the device reaches.

Good for deciding what to start and for a progress bar, no more: implementations stay differently far from the
limit, and what shares the machine is not known.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from mla import cost
from mla.bench import results
from mla.bench.limits.roofline import RooflineModel
from mla.bench.measure.variants import Kind, forwards
from mla.bench.subjects.memory import forward_cost
from mla.bench.subjects.op.problem import op_problem
from mla.bench.subjects.setting import Setting, scenario_setting
from mla.bench.workload.grid import Point
from mla.bench.workload.op_scenario import OpScenario

#: Implementation -> share of the device's limit that it is taken to reach.
SHARES = {"mla": 0.5, "mla-reference": 0.2, "transformers": 0.05, "transformers-eager": 0.05}
#: Seconds of a forward that no limit explains: launches, and Python between them.
OVERHEAD = 5e-4
#: Seconds per weight: drawing it, and laying it out.
DRAWING, PACKING = 2e-8, 5e-9
#: What is taken for granted where nothing is measured: right in proportion is enough for a progress bar.
NOMINAL_FLOPS, NOMINAL_BANDWIDTH, NOMINAL_FLOAT64 = 1e12, 3e10, 3e10


class Estimator:
    """Estimates scenarios of one run; with `measured` limits, or with nominal ones that cost no time."""

    def __init__(self, setting: Setting, kinds: Sequence[Kind], measured: bool) -> None:
        self._setting, self._kinds, self.measured = setting, kinds, measured
        self._float64 = _float64_rate() if measured else NOMINAL_FLOAT64

    def seconds(self, scenario: Point, names: Sequence[str]) -> float:
        """Return the seconds of a scenario: its oracle, and every forward of these implementations."""
        return self.preparation(scenario, names) + sum(
            forwards(self._kinds, scenario) * self.forward(scenario, name) for name in names
        )

    def preparation(self, scenario: Point, names: Sequence[str]) -> float:
        """Return the seconds for weights and the float64 oracle."""
        setting = scenario_setting(self._setting, scenario)
        if isinstance(scenario, OpScenario):
            return op_problem(setting, scenario).work.flops / self._float64
        config = setting.config
        rows = [length * scenario.inputs for length in scenario.query_lens]
        flops = cost.step_flops(config, rows, scenario.final_lens, cost.EXPANDED)
        return flops / self._float64 + cost.parameters(config) * (DRAWING + PACKING * len(names))

    def forward(self, scenario: Point, name: str) -> float:
        """Return the seconds of one forward."""
        setting = scenario_setting(self._setting, scenario)
        if isinstance(scenario, OpScenario):
            work = results.Cost(**op_problem(setting, scenario).work._asdict())
        else:
            one = forward_cost(setting, scenario, [scenario.inputs // 2])
            work = results.Cost(flops=scenario.layers * one.flops, bytes=scenario.layers * one.bytes)
        return self._floor(setting, work) / SHARES.get(name, min(SHARES.values())) + OVERHEAD

    def _floor(self, setting: Setting, work: results.Cost) -> float:
        flops, bandwidth = NOMINAL_FLOPS, NOMINAL_BANDWIDTH
        if self.measured:
            ceilings = RooflineModel(setting)
            flops = ceilings.flops().value
            # Sizes of a factor of two share a measurement, or a grid would measure for minutes.
            bandwidth = ceilings.bandwidth(1 << work.bytes.bit_length()).value
        return max(work.flops / flops, work.bytes / bandwidth)


def estimator(setting: Setting, kinds: Sequence[Kind], measured: bool) -> Estimator:
    """Return an estimator; one with nominal limits for a device that cannot run the yardstick."""
    found = Estimator(setting, kinds, measured)
    try:
        found._floor(setting, results.Cost(flops=1, bytes=1))
    except Exception:  # noqa: BLE001  # whatever a plugin raises must not cost the run
        return Estimator(setting, kinds, measured=False)
    return found


def _float64_rate(side: int = 512) -> float:
    """Return FLOP per second of the host's float64 products, the oracle's main work."""
    x = torch.ones(side, side, dtype=torch.float64)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        torch.mm(x, x)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
