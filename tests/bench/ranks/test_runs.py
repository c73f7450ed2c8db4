"""A run over several ranks is one run, with one result: of the slowest rank, checked on all of them."""

from __future__ import annotations

import pytest
from ranks_of_a_run import BOUND, Start

from mla.bench import results


def run(start: Start, *words: str, **more: object) -> results.Run:
    """Start a run that must go well, and return its result."""
    ranks = start(*words, "-o", "run.json", **more)
    assert ranks.wait(BOUND) == [0] * len(ranks.pids), ranks.err()
    assert ranks.err(1) == ranks.out(1) == ""
    return results.read(ranks.folder / "run.json")


@pytest.mark.parametrize("layout", ["tp=2", "dcp=2", "dp=2"])
def test_one_result_has_every_ranks_samples(start: Start, layout: str) -> None:
    found = run(start, "--parallel", layout)
    assert [case.scenario for case in found.cases] == ["prefill", "decode"]
    for case in found.cases:
        assert case.check.status == "ok"
        assert case.latency_ms is not None
        assert case.spread is not None
        assert (case.spread.layout, case.spread.library) == (layout, "gloo")
        assert [one.rank for one in case.spread.ranks] == [0, 1]
        by_forward = zip(*(one.samples for one in case.spread.ranks), strict=True)
        assert case.latency_ms.samples == list(map(max, by_forward))
        talks = layout != "dp=2"
        assert all((one.collective_bytes > 0) == talks for one in case.spread.ranks)
