"""What ranks have of a case's work: how evenly, and how much of it one device would not do."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mla.bench import results
from mla.bench.results.cases import device_cost, imbalances, repeated
from mla.bench.results.schema import Cost, RankFacts, Spread
from mla.bench.terminal import tables

Case = Callable[..., results.Case]


def facts(rank: int, ms: float = 2.0, collective_ms: float = 0.0, cost: Cost | None = None) -> RankFacts:
    return RankFacts(
        rank=rank,
        samples=[ms, ms, 9 * ms],
        collective_ms=collective_ms,
        collective_bytes=1,
        cache_bytes=1,
        weight_bytes=1,
        cost=cost,
    )


def spread(*ranks: RankFacts) -> Spread:
    return Spread(layout=f"dp={len(ranks)}", library="gloo", ranks=list(ranks))


def test_one_busy_rank_does_not_hide_in_the_average() -> None:
    """Three ranks work 2 ms, one 4 ms; what they wait in collectives does not count."""
    parts = spread(facts(0, 4.5, 2.5), facts(1, 4.5, 0.5), facts(2, 4.5, 2.5), facts(3, 4.5, 2.5))
    assert imbalances(parts) == pytest.approx([0, 1, 0, 0])


def test_of_each_kind_of_work_the_busiest_rank_counts(case: Case) -> None:
    few, many = Cost(flops=8, bytes=3), Cost(flops=6, bytes=5)
    split = case(cost=Cost(flops=10, bytes=6), spread=spread(facts(0, cost=few), facts(1, cost=many)))
    assert device_cost(split) == Cost(flops=8, bytes=5)
    assert repeated(split) == pytest.approx((4 / 14, 2 / 8))


def test_without_the_work_of_every_rank_nothing_is_known(case: Case) -> None:
    split = case(spread=spread(facts(0, cost=Cost(flops=8, bytes=3)), facts(1)))
    assert device_cost(split) is None
    assert repeated(split) is None
    assert repeated(case()) is None
    assert device_cost(case()) == case().cost


def test_ranks_of_a_prediction_that_were_not_timed_have_no_row(case: Case) -> None:
    parts = spread(*(facts(rank, 2.0 + rank) for rank in range(4)))
    parts.predicted, parts.timed_ranks = True, [0, 3]
    (table,) = tables.ranks([case(), case(spread=parts)])
    assert [row[:2] for row in table.rows] == [("0", "2"), ("3", "5")]
    assert table.notes[0].startswith("dp=4, predicted: 2 of 4 ranks ran alone")
