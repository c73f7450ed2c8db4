"""The tables of the comparison with ggml's ops from made-up samples, and how ways take turns."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.peers.ggml import record, table, ways
from benchmarks.peers.ggml.ways import Way, judged, take_turns, try_out
from mla.bench import results
from mla.errors import ResultError


def timing(
    name: str, party: str, *visits: float, dtype: str = "bfloat16", error: float = 0.002
) -> record.Timing:
    """Return a way with these samples."""
    return record.Timing(
        name=name, party=party, dtype=dtype, ms=sorted(visits)[len(visits) // 2],
        ci95=(min(visits), max(visits)), visits_ms=list(visits), calls=1, error=error,
    )  # fmt: skip


def run_of(*cases: record.Case) -> record.Comparison:
    """Return a result with these cases."""
    return record.Comparison(
        argv=[],
        created="2000-01-01T00:00:00+00:00",
        git_commit=None,
        backend=results.BackendFacts(
            name="cpu", version=None, device="a CPU", memory_bytes=None, cache_bytes=None
        ),
        environment={"torch": "2"},
        peer={"peer": "fake", "commit": "0123456789abcdef"},
        threads=2,
        seed=0,
        cases=list(cases),
    )


ATTENTION = record.Case(
    name="1x4",
    op="attention",
    flops=10**9,
    timings=[
        timing("peer f16", "peer", 3.0, 4.4, 4.5),
        timing("reference", "reference", 8.0, 8.0, 8.0),
        timing("peer bf16", "peer", 1.0, 1.0, 1.0, error=0.3),
        timing("mine", "ours", 2.0, 2.0, 3.0),
    ],
    passed_over={"peer unified": 50.0},
)


def test_ratios_are_medians_over_rounds_of_the_fastest_right_ways() -> None:
    lines = table.markdown(run_of(ATTENTION)).splitlines()
    # of 1.5, 2.2 and 1.5; the medians' ratio is 2.2
    assert "| 1x4 | 2.0 (2.0 .. 3.0) | 8 (8 .. 8) | 4.4 (3.0 .. 4.5), f16 | 1.50x |" in lines
    assert lines[-2:] == ["1x4: peer bf16 is WRONG, by 3.0e-01", "1x4: peer unified took 50 ms in one trial"]


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = run_of(ATTENTION)
    results.write(run, tmp_path / "out.json")
    assert record.read(tmp_path / "out.json") == run
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ResultError, match=r"other\.json' was not written by compare\.py"):
        record.read(tmp_path / "other.json")


def way(name: str, party: str, ms: float, said: list[str] | None = None) -> Way:
    """Return a way that takes so many ms, says so, and returns ones."""

    def timed(untimed: int, calls: int) -> list[float]:
        if said is not None:
            said.append(name)
        return [ms] * calls

    return Way(name, party, "float32", timed, lambda: torch.ones(2))


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process spins here."""
    monkeypatch.setattr(ways, "PAUSE", 0)


def test_only_slow_ways_of_others_are_passed_over() -> None:
    tried = [
        way("ours", "ours", 9.0),
        way("reference", "reference", 90.0),
        way("fast peer", "peer", 2.0),
        way("peer", "peer", 2.9),
        way("slow peer", "peer", 3.1),
        way("slow reference", "reference", 2100.0),
        way("slow", "ours", 2100.0),
    ]
    kept = [candidate.name for candidate in try_out(tried)]
    assert kept == ["ours", "reference", "fast peer", "peer", "slow"]
    assert [candidate.calls for candidate in tried] == [3, 1, 15, 10, 9, 1, 1]


def test_every_way_is_visited_once_per_round_in_changing_order() -> None:
    said: list[str] = []
    tried = [way(name, "ours", 1.0, said) for name in "abcd"]
    try_out(tried)
    said.clear()
    take_turns(tried, 6, seed=1)
    orders = [tuple(said[start : start + 4]) for start in range(0, 24, 4)]
    assert all(sorted(order) == list("abcd") for order in orders)
    assert len(set(orders)) > 1
    assert all(candidate.visits == [1.0] * 6 for candidate in tried)


def test_a_result_without_numbers_is_wrong() -> None:
    broken = way("ours", "ours", 1.0)
    broken.visits, broken.result = [1.0], lambda: torch.tensor([1.0, torch.nan])
    named = SimpleNamespace(name="1x4", op="attention")
    of = SimpleNamespace(work=SimpleNamespace(flops=1))
    problem: Any = SimpleNamespace(shape=named, case=of, truth=torch.ones(2).double)
    case = judged(problem, [broken, way("peer", "peer", 1.0)])
    assert case.timings[0].wrong
    assert case.of("ours") == []
    assert list(case.passed_over) == ["peer"]
