"""A yardstick that is much slower than what it judges runs fewer forwards, and keeps its intervals."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import pytest

from mla.bench.measure.variants import HEADLINE, Steps, Variant, steps
from mla.bench.plan.yardstick import FEWEST, SECONDS, shortened
from mla.bench.workload.scenario import Scenario, load_workload

COLD = Variant(cache="cold")
VARIANTS = (HEADLINE, COLD, Variant(mode="graph"))
PREFILL, DECODE = load_workload("standard")
LONG = Scenario(
    name="own", mode="decode", query_lens=(1,), history=(64,), runs=7, passes=40, warmups=0, layers=2
)
SCENARIOS = {"prefill": PREFILL, "decode": DECODE, "own": LONG, "smoke": load_workload("smoke")[0]}


def seconds(plan: Mapping[Variant, Steps], ms: float) -> float:
    return sum(one.passes * len(one.run) for one in plan.values()) * ms / 1e3


def test_the_readme_run_on_a_cpu_without_bf16() -> None:
    """1.24 s a prefill of the reference was measured on such a CPU, with ours at about 0.3 s."""
    found = shortened(PREFILL, (HEADLINE, COLD), {"mla": 300.0, "mla-reference": 1240.0})
    plan, reason = found["mla-reference"]
    assert [len(plan[one].run) for one in (HEADLINE, COLD)] == [2, 1]
    assert [plan[one].passes for one in (HEADLINE, COLD)] == [10, 6]
    assert seconds(plan, 1240.0) <= 130 * 0.3  # the time of ours; 161 s were planned
    assert reason == "it takes 4.1 times as long as mla, so it has 2 instead of 10 forwards a pass"


def test_a_decode_pass_keeps_its_steps_and_the_headline_its_passes() -> None:
    found = shortened(DECODE, (HEADLINE, COLD), {"mla": 4.2, "mla-reference": 80.0})
    plan, reason = found["mla-reference"]
    assert plan[HEADLINE] == steps(HEADLINE, DECODE)
    assert plan[COLD].run == range(100)
    assert plan[COLD].timed == steps(COLD, DECODE).timed
    assert plan[COLD].passes == FEWEST
    assert reason.endswith("so it has 2 instead of 6 passes of its other timings")


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=list(SCENARIOS))
@pytest.mark.parametrize(("first", "own"), [*product((0.01, 5.0, 900.0), (0.02, 30.0, 1e3, 1e6))])
def test_no_more_time_than_the_first_or_as_few_forwards_as_there_can_be(
    scenario: Scenario, first: float, own: float
) -> None:
    whole = sum(one.passes * len(one.run) for one in (steps(v, scenario) for v in VARIANTS))
    allowed = max(SECONDS, whole * first / 1e3)
    found = shortened(scenario, VARIANTS, {"mla": first, "other": own})
    assert ("other" in found) <= (whole * own / 1e3 > allowed)
    for plan, _ in found.values():
        for variant, one in plan.items():
            before = steps(variant, scenario)
            assert one.run in (before.run, range(len(one.run)))
            assert 1 <= len(one.run) <= len(before.run)
            assert {*one.timed} <= {*one.run}
            assert min(FEWEST, before.passes) <= one.passes <= before.passes
        assert plan[HEADLINE].passes == scenario.rounds
        least = (scenario.mode == "decode" or len(plan[HEADLINE].run) == 1) and all(
            one.passes <= FEWEST for variant, one in plan.items() if variant != HEADLINE
        )
        assert seconds(plan, own) <= allowed or least


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=list(SCENARIOS))
def test_what_is_fast_or_first_or_unknown_keeps_its_passes(scenario: Scenario) -> None:
    assert shortened(scenario, VARIANTS, {}) == {}
    assert shortened(scenario, VARIANTS, {"mla": 1e6}) == {}
    assert shortened(scenario, VARIANTS, {"mla": 1e4, "mla-reference": 1e4, "transformers": 9e3}) == {}
    assert shortened(scenario, VARIANTS, {"mla": 1e4, "mla[o_proj=reference]": 1.9e4}) == {}
    assert shortened(scenario, VARIANTS, {"mla": 0.001, "mla-reference": 0.005}) == {}


def test_each_yardstick_is_held_to_the_first() -> None:
    found = shortened(PREFILL, VARIANTS, {"mla": 200.0, "fast": 199.0, "slow": 900.0, "slower": 4000.0})
    assert [*found] == ["slow", "slower"]
    assert len(found["slow"][0][HEADLINE].run) == 2
    assert len(found["slower"][0][HEADLINE].run) == 1


def test_spread_over_the_rounds_as_every_variant_is() -> None:
    found = shortened(DECODE, VARIANTS, {"mla": 1.0, "mla-reference": 500.0})
    plan = found["mla-reference"][0][COLD]
    assert sum(plan.due(index, DECODE.rounds) for index in range(DECODE.rounds)) == plan.passes == FEWEST
