"""A yardstick that is much slower than what it judges runs less, and keeps the interval of its headline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product

import pytest

from mla.bench.measure import target
from mla.bench.measure.target import BASELINE_S, EXTRA_FORWARDS, LEFT, MIN_PASSES, MIN_STEPS, SHARE
from mla.bench.measure.variants import HEADLINE, Steps, Variant, steps
from mla.bench.results import stats
from mla.bench.workload.scenario import Scenario
from mla.bench.workload.workload_file import read_workload

COLD = Variant(cache="cold")
VARIANTS = (HEADLINE, COLD, Variant(mode="graph"))
PREFILL, DECODE = read_workload("standard").scenarios
LONG_DECODE = Scenario(
    name="own", mode="decode", query_lens=(1,), history=(64,), runs=7, passes=40, warmups=0, layers=2
)
SCENARIOS = {
    "prefill": PREFILL,
    "decode": DECODE,
    "own": LONG_DECODE,
    "smoke": read_workload("smoke").scenarios[0],
}


def shortened(
    scenario: Scenario,
    variants: Sequence[Variant],
    ms: Mapping[str, float],
    most: float = math.inf,
    added: Sequence[str] = (),
) -> dict[str, Steps]:
    """Return what each implementation runs that runs less, the first of `ms` being the first of the run."""
    first, *others = ms
    cut = partial(target.shortened, scenario, variants, ms[first])
    plans = {name: cut(ms[name], most, name in added) for name in others}
    return {name: plan for name, plan in plans.items() if plan is not None}


def seconds(plan: Steps, ms: float) -> float:
    return plan.passes * len(plan.run) * ms / 1e3


@pytest.mark.parametrize(
    ("scenario", "variants", "ms", "passes", "forwards"),
    [
        # 1.24 s a prefill of the reference was measured on a CPU without bf16, with ours at about 0.3 s.
        (PREFILL, (HEADLINE, COLD), (300.0, 1240.0), 6, 1),
        (DECODE, (HEADLINE,), (4.2, 80.0), 6, 6),
        (DECODE, VARIANTS, (7.8, 930.0), 6, MIN_STEPS),
    ],
)
def test_a_slow_yardstick_runs_fewer_and_shorter_passes(
    scenario: Scenario, variants: tuple[Variant, ...], ms: tuple[float, float], passes: int, forwards: int
) -> None:
    plan = shortened(scenario, variants, dict(zip(("mla", "other"), ms, strict=True)))["other"]
    assert plan == Steps(range(forwards), range(forwards), passes)


def test_a_baseline_that_nobody_asked_for_is_cut_though_it_is_not_slow() -> None:
    ms = {"mla": 100.0, "transformers": 150.0}
    assert shortened(PREFILL, VARIANTS, ms) == {}
    assert shortened(PREFILL, VARIANTS, ms, added=["transformers"])["transformers"].passes == MIN_PASSES
    fast = {"mla": 0.1, "transformers": 0.15}
    assert shortened(PREFILL, VARIANTS, fast, added=["transformers"]) == {}


def test_what_cannot_run_less_leaves_out_other_timings_alone() -> None:
    least = Scenario(name="own", mode="decode", query_lens=(1,), history=(64,), runs=3, passes=6)
    ms = {"mla": 5.0, "other": 1000.0}
    assert shortened(least, (HEADLINE,), ms) == {}
    assert shortened(least, (HEADLINE, COLD), ms) == {"other": steps(HEADLINE, least)}


def test_other_timings_go_first_then_passes_then_steps() -> None:
    def of(ms: float) -> Steps:
        return shortened(LONG_DECODE, VARIANTS * 4, {"mla": 0.1, "other": ms})["other"]

    whole = 1e3 * LEFT * BASELINE_S / (40 * 7)
    assert of(0.99 * whole) == steps(HEADLINE, LONG_DECODE)
    assert (of(2.1 * whole).passes, len(of(2.1 * whole).run)) == (19, 7)
    assert (of(10 * whole).passes, len(of(10 * whole).run)) == (MIN_PASSES, 4)


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=list(SCENARIOS))
@pytest.mark.parametrize(("first", "second"), [*product((0.01, 5.0, 900.0), (0.02, 30.0, 1e3, 1e6))])
def test_no_more_time_than_allowed_or_as_few_forwards_as_an_interval_needs(
    scenario: Scenario, first: float, second: float
) -> None:
    whole = EXTRA_FORWARDS + sum(
        variant_steps.passes * len(variant_steps.run)
        for variant_steps in (steps(v, scenario) for v in VARIANTS)
    )
    allowed = max(BASELINE_S, SHARE * whole * first / 1e3)
    cut = shortened(scenario, VARIANTS, {"mla": first, "other": second})
    assert ("other" in cut) == (second >= 2 * first and whole * second / 1e3 > allowed)
    for plan in cut.values():
        before = steps(HEADLINE, scenario)
        assert plan.run == plan.timed == range(len(plan.run))
        assert 1 <= len(plan.run) <= len(before.run)
        assert min(MIN_PASSES, before.passes) <= plan.passes <= before.passes
        assert stats.median_interval(range(plan.passes)) or before.passes < MIN_PASSES
        least = MIN_STEPS if scenario.mode == "decode" else 1
        fewest = plan.passes, len(plan.run)
        assert seconds(plan, second) <= LEFT * allowed or fewest == (MIN_PASSES, least)


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=list(SCENARIOS))
def test_what_is_fast_or_first_or_unknown_keeps_its_passes(scenario: Scenario) -> None:
    assert shortened(scenario, VARIANTS, {"mla": 1e6}) == {}
    assert shortened(scenario, VARIANTS, {"mla": 1e4, "mla-reference": 1e4, "transformers": 9e3}) == {}
    assert shortened(scenario, VARIANTS, {"mla": 1e4, "mla[o_proj=reference]": 1.9e4}) == {}
    assert shortened(scenario, VARIANTS, {"mla": 0.001, "mla-reference": 0.005}) == {}


def test_each_yardstick_is_held_to_the_first() -> None:
    cut = shortened(PREFILL, VARIANTS, {"mla": 200.0, "fast": 199.0, "slow": 900.0, "slower": 4000.0})
    assert [*cut] == ["slow", "slower"]
    assert [len(cut[name].run) for name in cut] == [1, 1]


def test_where_little_time_is_left_that_counts() -> None:
    assert shortened(DECODE, VARIANTS, {"mla": 5.0, "other": 6.0}, 20) == {
        "other": Steps(range(3), range(3), 6)
    }
    slow = {"mla": 5.0, "other": 100.0}
    assert shortened(DECODE, VARIANTS, slow, 1000) == shortened(DECODE, VARIANTS, slow)
    assert shortened(DECODE, VARIANTS, slow, 20) != shortened(DECODE, VARIANTS, slow)
