"""Latencies under ceilings: near, above by a little, and above by what cannot be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mla.bench import results
from mla.bench.limits.roofline import implausible, limits, merged, place, place_case
from mla.bench.results.schema import Ceiling, Cost, RankFacts, Roofline, Spread, Stage

READ = Ceiling(work="read", value=1e9, source="measured: x", footprint_bytes=8 << 20, lowest=1e9)
PRODUCT = Ceiling(work="matmul", value=1e12, source="measured: y", dtype="bfloat16", lowest=1e12)
COST = Cost(flops=10**9, bytes=10**6)  # 1 ms of either

Case = Callable[..., results.Case]


@pytest.mark.parametrize("latency", [0.999, 0.8, 0.4, 0.001])
def test_above_its_limit_a_case_has_a_doubt_and_no_share(latency: float) -> None:
    roofline = place(Cost(flops=10**9, bytes=0), latency, READ, PRODUCT)
    assert (roofline.fraction, roofline.bound, roofline.floor_ms) == (None, "compute", 1.0)
    assert roofline.doubt.startswith("the limit or the time is suspect: ")
    assert f"{latency:.3g} ms" in roofline.doubt
    assert "measured: y" in roofline.doubt


@pytest.mark.parametrize(
    ("times", "lowest", "far"),
    [
        (1.0, 1e12, False),
        (1.9, 1e12, False),
        (2.1, 1e12, True),
        (500, 1e12, True),
        (2.1, 0.5e12, False),  # the limit itself varied by two
        (2.9, 0.5e12, False),
        (3.1, 0.5e12, True),
        (2.1, 0.9e12, True),
        (2.1, None, True),  # declared
        (3.9, 0.01e12, False),
        (4.1, 0.01e12, True),  # measured once under a heavy load
    ],
)
def test_only_what_is_far_above_the_spread_of_the_limit_cannot_be(
    times: float, lowest: float | None, far: bool
) -> None:
    product = Ceiling(work="matmul", value=1e12, source="measured: y", lowest=lowest)
    reason = implausible(Cost(flops=10**9, bytes=0), 1.0 / times, READ, product)
    assert bool(reason) == far
    if far:
        assert reason.startswith("no device is this much faster than its limit: ")
        assert "measured: y" in reason


def test_the_smaller_floor_may_be_the_one_that_is_known_well() -> None:
    vague = Ceiling(work="read", value=0.8e9, source="r", lowest=0.3e9)
    assert "measured: y" in implausible(COST, 0.45, vague, PRODUCT)
    assert implausible(COST, 1.0, vague, PRODUCT) == ""


def test_what_a_larger_footprint_reaches_counts_and_what_a_smaller_one_does_not() -> None:
    reads = [
        Ceiling(work="read", value=v, source="", footprint_bytes=f) for v, f in ((9, 1 << 20), (3, 8 << 20))
    ]
    reads.append(Ceiling(work="read", value=5, source="", footprint_bytes=32 << 20))
    declared = Ceiling(work="read", value=4, source="")
    assert limits([*reads, PRODUCT], "bfloat16", 8 << 20) == (reads[2], PRODUCT)
    assert limits([*reads[:2], declared, PRODUCT], "bfloat16", 8 << 20) == (declared, PRODUCT)
    assert limits([*reads, PRODUCT], "bfloat16", 1) == (reads[0], PRODUCT)
    assert limits([*reads, PRODUCT], "float32", 1) is None
    assert limits([PRODUCT], "bfloat16", 1) is None


def test_measurements_of_one_thing_become_one_ceiling() -> None:
    def read(value: float, lowest: float | None, footprint: int = 1 << 20) -> Ceiling:
        return Ceiling(work="read", value=value, source=f"{value}", footprint_bytes=footprint, lowest=lowest)

    assert merged([read(3, 2), read(5, 4), read(4, None), read(7, 7, 1 << 21)]) == [
        Ceiling(work="read", value=5, source="5", footprint_bytes=1 << 20, lowest=2),
        read(7, 7, 1 << 21),
    ]
    two = [PRODUCT, Ceiling(work="matmul", value=1, source="", dtype="float32")]
    assert merged(two) == two


def measured(case: Case, **changes: Any) -> results.Case:
    """Return a case of 2 ms that was placed under a lower limit."""
    old = Roofline(floor_ms=1.9, fraction=0.95, bound="memory", peak_source="before")
    return case(cost=COST, roofline=old, **changes)


def test_a_case_moves_under_higher_limits_and_so_do_its_stages(case: Case) -> None:
    stages = [Stage(name="a", ms=0.5, cost=COST, roofline=Roofline()), Stage(name="b", ms=0.1)]
    placed = measured(case, stages=stages)
    place_case(placed, [READ, PRODUCT])
    assert (placed.roofline.floor_ms, placed.roofline.fraction, placed.roofline.peak_source) == (
        1.0,
        0.5,
        "measured: x",
    )
    assert stages[0].roofline is not None
    assert (stages[0].roofline.fraction, stages[0].roofline.floor_ms) == (None, 1.0)
    assert stages[0].roofline.doubt
    assert stages[1].roofline is None


def test_several_layers_share_a_footprint_and_a_case_is_one_of_them(case: Case) -> None:
    placed = measured(case, layers=10)
    few, many = (
        Ceiling(work="read", value=v, source="", footprint_bytes=f)
        for v, f in ((9e9, 1 << 20), (1e9, 16 << 20))
    )
    place_case(placed, [few, many, PRODUCT])
    assert (placed.roofline.floor_ms, placed.roofline.fraction) == (1.0, 0.5)


def test_a_case_without_limits_or_without_a_number_stays_as_it_is(case: Case) -> None:
    placed = measured(case)
    place_case(placed, [READ])
    assert placed.roofline.peak_source == "before"
    none = case(latency_ms=None)
    place_case(none, [READ, PRODUCT])
    assert none.roofline == Roofline()


def over_ranks(case: Case, *costs: Cost | None) -> results.Case:
    """Return a case of 2 ms over two ranks that have so much of its work."""
    ranks = [
        RankFacts(
            rank=rank,
            samples=[2.0, 1.0, 3.0],
            collective_ms=0.1,
            collective_bytes=1,
            cache_bytes=1,
            weight_bytes=1,
            cost=cost,
        )
        for rank, cost in enumerate(costs)
    ]
    return case(cost=COST, spread=Spread(layout="tp=2", library="gloo", ranks=ranks))


def test_a_case_over_ranks_is_held_against_the_most_that_any_of_them_has(case: Case) -> None:
    some = Cost(flops=COST.flops // 2, bytes=3 * COST.bytes // 5)
    more = Cost(flops=COST.flops // 2, bytes=4 * COST.bytes // 5)
    placed = over_ranks(case, some, more)
    place_case(placed, [READ, PRODUCT])
    assert (placed.roofline.floor_ms, placed.roofline.fraction) == (pytest.approx(0.8), pytest.approx(0.4))
    unknown = over_ranks(case, some, None)
    place_case(unknown, [READ, PRODUCT])
    assert unknown.roofline == Roofline()
