"""How long a run will take, roughly, from what it has to compute and what the device reaches.

Good for deciding what to start and for a progress bar, no more: implementations differ in how far they stay
from the limit, and what else runs on the machine is not known.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

from mla.bench import results
from mla.bench.measure import passes, target
from mla.bench.measure.variants import HEADLINE, Steps, Variant, forwards, steps
from mla.bench.plan import yardstick
from mla.bench.plan.rates import Rates, measure_rates
from mla.bench.plan.request import Request, ScenarioPlan
from mla.bench.workload.implementations import parse_one

# Implementation -> share of the device's limit that it is assumed to reach.
SHARES = {"mla": 0.5, "mla-reference": 0.2, "transformers": 0.05, "transformers-eager": 0.05}
# Seconds per weight: drawing it, and laying it out.
DRAWING, PACKING = 2e-8, 5e-9
# Assumed where nothing is measured: right in proportion is enough for a progress bar.
NOMINAL = Rates(flops=1e12, bandwidth=3e10, float64=3e10)
# Times as long as one device's a forward takes of which all ranks are simulated: they begin anew for every
# collective, and those that are timed run twice more.
SIMULATED = 5
# Seconds for the limits of a scenario, and the most for an implementation's warm-ups, evidence and forwards
# on new lengths, which end by the clock; and those of their forwards that run whatever they take.
LIMITS, BOUNDED, FIXED = 4.0, 8.0, 8
# Seconds for limits that are measured once more.
AGAIN = 1.0
# Bytes that are swept before a cold forward, at least.
LEAST_SWEPT = 32 << 20


class Estimator:
    """Estimates scenarios of one run; with `measured` rates, or with nominal ones that cost no time."""

    def __init__(self, variants: Sequence[Variant], rates: Rates = NOMINAL, cache_bytes: int = 0) -> None:
        self._variants, self._rates = variants, rates
        self._sweep = 2 * max(cache_bytes, LEAST_SWEPT) / rates.bandwidth
        self.measured = rates is not NOMINAL
        self._known: dict[tuple[str, str], float] = {}  # seconds of a forward that was run, by case
        self._factors: dict[str, float] = {}  # implementation -> times as long as its rates say

    def learn(self, scenario: ScenarioPlan, name: str, seconds: float) -> None:
        """Record what a forward took; other scenarios of this implementation are corrected by it."""
        self._factors.pop(name, None)
        self._factors[name] = seconds / self.forward(scenario, name)
        self._known[scenario.name, name] = seconds

    def usual(self, scenario: ScenarioPlan, names: Sequence[str], counted: bool = False) -> float:
        """Return the seconds of a scenario after the first limits, where what takes too long gives way.

        With counts of the user's (`counted`), nothing does.
        """
        again = AGAIN - LIMITS
        full = self.seconds(scenario, names) + self.beside(scenario, names) + again
        alone = copy.copy(self)
        alone._variants = [HEADLINE]
        headline = alone.seconds(scenario, names) + alone.beside(scenario, names) + again
        most = max(target.SECONDS, min(headline, target.MOST + self.preparation(scenario, names)))
        return full if counted else min(full, most)

    def seconds(self, scenario: ScenarioPlan, names: Sequence[str], first: str | None = None) -> float:
        """Return the seconds of a scenario: its oracle, and every forward of these implementations.

        `first` is the implementation that yardsticks are held to; by default the first one of `names`.
        """
        return self._total(scenario, names, first, least=False)

    def least(self, scenario: ScenarioPlan, names: Sequence[str], first: str | None = None) -> float:
        """Return the seconds after which a scenario may have numbers: of all timed passes, only one."""
        return self._total(scenario, names, first, least=True)

    def one_pass(self, scenario: ScenarioPlan, names: Sequence[str], first: str) -> float:
        """Return the seconds of the longest of the headline's passes."""
        cut, steps = self._shortened(scenario, names, first), scenario.point.steps
        counts = {name: len(cut[name].run) if name in cut else steps for name in names}
        return max((count * self.forward(scenario, name) for name, count in counts.items()), default=0.0)

    def beside(self, scenario: ScenarioPlan, names: Sequence[str]) -> float:
        """Return the seconds of all that `seconds` leaves out: limits, evidence, forwards after a switch."""
        each = {name: self.forward(scenario, name) for name in names}
        evidence = sum(min(yardstick.BESIDE * one, BOUNDED + FIXED * one) for one in each.values())
        switches = sum(steps(one, scenario.point).passes for one in self._variants)
        reloaded = sum(switches * one for one in each.values() if one < passes.LONG / 1e3)
        return LIMITS + evidence + reloaded

    def _total(self, scenario: ScenarioPlan, names: Sequence[str], first: str | None, least: bool) -> float:
        cut = self._shortened(scenario, names, first or next(iter(names), ""))
        runs = (
            self._cut(scenario, name, cut[name], least) if name in cut else self._whole(scenario, name, least)
            for name in names
        )
        return self.preparation(scenario, names) + sum(runs)

    def _shortened(self, scenario: ScenarioPlan, names: Sequence[str], first: str) -> dict[str, Steps]:
        """Return what slow yardsticks run instead of all that is planned."""
        ms = {name: 1e3 * self.forward(scenario, name) for name in dict.fromkeys((first, *names))}
        found = yardstick.shortened(scenario.point, self._variants, ms)
        return {name: plan for name, (plan, _) in found.items()}

    def _cut(self, scenario: ScenarioPlan, name: str, plan: Steps, least: bool) -> float:
        """Return the seconds of a slow yardstick's forwards."""
        point, each = scenario.point, self.forward(scenario, name)
        warmed = min(point.warmups, max(passes.FEWEST, 1 + math.ceil(passes.SECONDS / each)))
        checked, timed = min(point.inputs, len(plan.run)), 1 if least else plan.passes
        return each * (checked + warmed + timed * len(plan.run))

    def _whole(self, scenario: ScenarioPlan, name: str, least: bool) -> float:
        """Return the seconds of all forwards of an implementation, or all but those of later passes."""
        point, cold = scenario.point, self._extra(scenario, cold=True)
        count = forwards(self._variants, point)
        sweeps = sum((one.passes + 1) * len(one.timed) for one in cold)
        if least:
            count -= (point.rounds - 1) * point.steps
            count -= sum(one.passes * len(one.run) for one in self._extra(scenario))
            sweeps = sum(len(one.timed) for one in cold)
        return count * self.forward(scenario, name) + sweeps * self._sweep

    def _extra(self, scenario: ScenarioPlan, cold: bool = False) -> list[Steps]:
        """Return the steps of the variants beside the headline, or of those whose caches are swept."""
        extra = [one for one in self._variants if one != HEADLINE and (one.cache == "cold" or not cold)]
        return [steps(one, scenario.point) for one in extra]

    def preparation(self, scenario: ScenarioPlan, names: Sequence[str]) -> float:
        """Return the seconds for weights and the float64 oracle."""
        needs = scenario.needs
        weights = needs.parameters * (DRAWING + PACKING * len(names))
        compared = 0.0  # ours are held to a pass of the reference
        if scenario.point.op is None and scenario.setting.ranks is None:
            compared = scenario.point.inputs * self.forward(scenario, "mla-reference")
        return needs.oracle_flops / self._rates.float64 + compared + weights

    def forward(self, scenario: ScenarioPlan, name: str) -> float:
        """Return the seconds of one forward."""
        if (scenario.name, name) in self._known:
            return self._known[scenario.name, name]
        return self._factors.get(name, 1.0) * self._by_rates(scenario, name)

    def _by_rates(self, scenario: ScenarioPlan, name: str) -> float:
        base, work = parse_one(name).base, scenario.needs.forward
        seconds = self.floor(work) / SHARES.get(base, min(SHARES.values()))
        if base != "mla":  # which multiplies with torch, in the run's dtype
            seconds = max(seconds, work.flops / self._rates.by_torch)
        ranks = scenario.setting.here
        if ranks == 1:
            return seconds + self._rates.overhead
        return SIMULATED * (seconds + ranks * self._rates.overhead)

    def floor(self, work: results.Cost) -> float:
        """Return the seconds below which the device cannot do some work."""
        return max(work.flops / self._rates.flops, work.bytes / self._rates.bandwidth)


def nominal(request: Request) -> Estimator:
    """Return an estimator that measures nothing."""
    return Estimator(request.variants.timed)


def measured(request: Request) -> Estimator:
    """Return an estimator with measured rates; nominal ones for a device that cannot be measured."""
    setting = request.setting
    try:
        cache_bytes = setting.backend.device_info().cache_bytes or 0
        return Estimator(request.variants.timed, measure_rates(setting), cache_bytes)
    except Exception:  # noqa: BLE001  # whatever a plugin raises must not cost the run
        return nominal(request)


def nominal_seconds(request: Request) -> float:
    """Return the length of a progress bar, in nominal seconds."""
    estimator = nominal(request)
    return sum(estimator.seconds(scenario, request.implementations) for scenario in request.scenarios)
