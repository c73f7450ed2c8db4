"""Strong scaling: what counts as the same work, and as how many cores or devices."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mla.bench import results
from mla.bench.results.compare import compare
from mla.bench.results.schema import RankFacts, Spread

Run = Callable[..., results.Run]
STEADY = [8.0, 8.01, 7.99, 8.0, 8.02, 7.98]
CARD = {"card": "card A"}


@pytest.fixture
def run(make_run: Run) -> Run:
    """Return a maker of a run on a processor; `layout` of two ranks, `threads` of each."""

    def run(
        ms: float, layout: str = "", threads: int = 1, card: str = "a CPU", predicted: bool = False
    ) -> results.Run:
        samples = [ms * sample / 8 for sample in STEADY]
        facts = {"samples": samples, "collective_ms": 1, "collective_bytes": 1}
        ranks = [RankFacts(rank=rank, cache_bytes=1, weight_bytes=1, **facts) for rank in range(2)]
        spread = Spread(layout=layout, library="gloo", ranks=ranks, predicted=predicted)
        made = make_run(samples, spread=spread if layout else None)
        made.environment = {"torch_threads": str(threads), "processor": "a CPU"}
        made.backend.device = card
        return made

    return run


@pytest.mark.parametrize(
    ("one", "several", "said"),
    [
        ({}, {}, "1.60x on 2 times the cores: efficiency 80 %"),
        ({"threads": "many"}, {"threads": 0}, "1.60x on 2 times the cores: efficiency 80 %"),
        ({"threads": 4}, {"threads": 2}, "1.60x on 1 times the cores: efficiency 160 %"),
        ({**CARD, "threads": 8}, {**CARD, "threads": 4}, "1.60x on 2 times the devices: efficiency 80 %"),
        (CARD, {"card": "card B"}, ""),
        ({}, CARD, ""),
        ({"layout": "dp=2"}, {}, ""),
        ({}, {"layout": ""}, ""),
    ],
)
def test_efficiency_is_over_cores_or_devices_of_one_kind(
    run: Run, one: dict[str, object], several: dict[str, object], said: str
) -> None:
    (case,) = compare(run(8.0, **one), run(5.0, **{"layout": "tp=2", **several}))
    assert (case.verdict, case.note) == ("FASTER", said)


@pytest.mark.parametrize(
    ("base", "new", "verdict", "told"),
    [
        ({"layout": "tp=2"}, {"layout": "tp=2", "predicted": True}, "FASTER", "new"),
        ({"layout": "tp=2", "predicted": True}, {"layout": "tp=2"}, "FASTER", "base"),
        ({}, {"layout": "tp=2", "predicted": True}, "REFUSED", "new"),
        ({"layout": "tp=2", "predicted": True}, {"layout": "dp=2"}, "REFUSED", "base"),
    ],
)
def test_a_prediction_is_held_against_a_measurement_of_its_layout_alone(
    run: Run, base: dict[str, object], new: dict[str, object], verdict: str, told: str
) -> None:
    (case,) = compare(run(8.0, **base), run(5.0, **new))
    assert case.verdict == verdict
    reason = ", on layouts that differ" if verdict == "REFUSED" else ""
    assert case.remarks == f"the {told} run is predicted, and the other measured{reason}"


@pytest.mark.parametrize(("layout", "same"), [("dcp=2", True), ("tp=2,dcp=1", False)])
def test_only_a_context_over_ranks_may_take_another_path(run: Run, layout: str, same: bool) -> None:
    """It is attended absorbed, whatever one device chose."""
    base, new = run(8.0), run(5.0, layout)
    new.attention = "absorbed"
    (case,) = compare(base, new)
    assert (case.verdict == "FASTER", "efficiency" in case.note) == (same, same)
