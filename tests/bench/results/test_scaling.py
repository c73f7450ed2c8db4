"""Strong scaling: what counts as the same work, and as how many cores or devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from mla.bench import results
from mla.bench.results.compare import Scaled, compare, scaling
from mla.bench.results.schema import Cost, RankFacts, Spread
from mla.bench.terminal import tables

Run = Callable[..., results.Run]
STEADY = [8.0, 8.01, 7.99, 8.0, 8.02, 7.98]


@pytest.fixture
def run(make_run: Run) -> Run:
    """Return a maker of a run on a processor; `layout` of two ranks, `threads` of each."""

    def run(ms: float, layout: str = "", threads: int = 1, card: str = "", **changes: Any) -> results.Run:
        samples = [ms * sample / 8 for sample in STEADY]
        if layout:
            changes["spread"] = spread(samples, layout, changes.pop("predicted", False))
        made = make_run(samples, **changes)
        made.environment = {"torch_threads": str(threads), "processor": "a CPU"}
        made.backend.device = card or "a CPU"
        return made

    return run


def spread(samples: list[float], layout: str, predicted: bool) -> Spread:
    cost = Cost(flops=625 * 10**6, bytes=10**6)  # of all 10**9 FLOPs and 10**6 bytes
    ranks = [
        RankFacts(
            rank=rank,
            samples=samples,
            collective_ms=0.5 + rank,
            collective_bytes=1,
            cache_bytes=1,
            weight_bytes=1,
            cost=cost,
        )
        for rank in range(2)
    ]
    timed = [0] if predicted else []
    return Spread(layout=layout, library="gloo", ranks=ranks, predicted=predicted, timed_ranks=timed)


def cells(*scaled: Scaled) -> Sequence[str]:
    """Return the last row of a table."""
    (table,) = tables.scaling([scaled])
    return table.rows[-1]


def test_two_threads_of_one_rank_and_two_ranks_of_one_are_the_same_resources(run: Run) -> None:
    ((base, threads, ranks),) = scaling([run(4.2, threads=2), run(8.0), run(5.0, "tp=2")])
    assert (base.run, base.on, base.speedup, base.interval, base.efficiency) == (
        1,
        "1 x 1 thread",
        1,
        None,
        1,
    )
    assert (threads.on, threads.layout) == ("1 x 2 threads", "one device")
    assert (ranks.on, ranks.layout) == ("2 x 1 thread", "tp=2")
    assert threads.efficiency == pytest.approx(8 / 4.2 / 2)
    assert ranks.speedup == pytest.approx(1.6)
    assert ranks.efficiency == pytest.approx(0.8)
    assert ranks.interval is not None
    assert ranks.interval[0] < 1.6 < ranks.interval[1]
    # Repeated is of bytes, where it is not known which kind limits the case.
    assert cells(base, threads, ranks)[3::2] == ("1.60", "80 %", "50 %")
    assert cells(base, threads, ranks)[6] == "1"


def test_what_a_layout_repeats_is_of_the_work_that_limits_the_case(run: Run) -> None:
    limit = results.Roofline(floor_ms=1.0, fraction=0.2, bound="compute")
    (scaled,) = scaling([run(8.0), run(5.0, "tp=2", roofline=limit)])
    assert cells(*scaled)[-1] == "20 %"


def test_threads_of_the_host_do_not_count_on_cards(run: Run) -> None:
    (scaled,) = scaling([run(8.0, threads=8, card="a card"), run(5.0, "tp=2", threads=4, card="a card")])
    assert [row.on for row in scaled] == ["1 device", "2 devices"]
    assert scaled[1].efficiency == pytest.approx(0.8)


def test_cores_and_cards_are_not_one_kind(run: Run) -> None:
    (scaled,) = scaling([run(8.0), run(5.0, "tp=2", card="a card")])
    assert scaled[1].speedup == pytest.approx(1.6)
    assert scaled[1].efficiency is None


@pytest.mark.parametrize("layout", ["tp=2", ""])
def test_there_is_no_efficiency_across_different_cards(run: Run, layout: str) -> None:
    """However many there are of each: the speedup is that of the card as well."""
    runs = [run(8.0, card="card A"), run(5.0, layout, card="card B"), run(6.0, "dcp=2", card="card A")]
    (scaled,) = scaling(runs)
    by_card = {(row.device, row.layout): row.efficiency for row in scaled}
    assert by_card == {
        ("card A", "one device"): 1.0,
        ("card B", layout or "one device"): None,
        ("card A", "dcp=2"): pytest.approx(8 / 6 / 2),
    }
    said = "no efficiency on card B: the base ran on card A"
    assert said in tables.scaling([scaled])[0].notes
    assert "no efficiency" not in tables.scaling(scaling([runs[0], runs[2]]))[0].text("table")


def test_predictions_say_so(run: Run) -> None:
    (scaled,) = scaling([run(8.0), run(5.0, "tp=2", predicted=True)])
    assert [row.layout for row in scaled] == ["one device", "tp=2 (predicted)"]


def test_other_work_and_ranks_alone_do_not_scale(run: Run) -> None:
    assert scaling([run(8.0), run(5.0)]) == []
    assert scaling([run(5.0, "tp=2"), run(4.0, "dp=2")]) == []
    assert scaling([run(8.0, history=[4, 1]), run(5.0, "tp=2")]) == []
    assert scaling([run(8.0, dtype="float32"), run(5.0, "tp=2")]) == []
    other = run(8.0)
    other.config = {"hidden_size": 65}
    assert scaling([other, run(5.0, "tp=2")]) == []


@pytest.mark.parametrize(("layout", "same"), [("dcp=2", True), ("tp=2,dcp=1", False)])
def test_only_a_context_over_ranks_may_take_another_path(run: Run, layout: str, same: bool) -> None:
    """It is attended absorbed, whatever one device chose."""
    base, new = run(8.0), run(5.0, layout)
    new.attention = "absorbed"
    assert bool(scaling([base, new])) == same
    assert (compare(base, new)[0].verdict == "FASTER") == same
