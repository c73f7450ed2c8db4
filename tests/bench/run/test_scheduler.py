"""A run over many points: its order, what is skipped, and what a log shows."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mla.bench import results
from mla.bench.workload.grid import points_of
from mla.bench.workload.workload_file import PRESETS, read_workload

Bench = Callable[..., Any]
VIRTUAL = ("--backend", "fake-virtual-clock")
SHORT_RUN = ("--runs", "1", "--passes", "1", "--warmups", "0", "--scenario", "decode")
GRID = ("-a", "kv=1..6+1")


def visited(err: str) -> list[str]:
    """Return the scenarios in the order in which a log says that they were finished."""
    return re.findall(r"^\d+ of 6  (.*): mla (?:[\d.]+ ms|unreliable .*)$", err, re.MULTILINE)


def test_points_run_in_a_seeded_order_and_are_reported_in_the_workloads(
    bench: Bench, small: list[str]
) -> None:
    def orders(seed: str) -> tuple[list[str], list[str]]:
        done = bench(
            *VIRTUAL, *small, *SHORT_RUN, *GRID, "--seed", seed, "-o", "run.json", fakes=["virtual_clock"]
        )
        return visited(done.err), [case.scenario for case in results.read(Path("run.json")).cases]

    names = [f"decode kv={length}" for length in range(1, 7)]
    ran, reported = orders("0")
    assert sorted(ran) == names
    assert ran != names
    assert reported == names
    assert orders("0") == (ran, names)
    assert orders("1")[0] not in (ran, names)


def test_a_point_that_does_not_fit_is_named_and_the_others_run(bench: Bench, small: list[str]) -> None:
    axes = ("-a", "kv=8,2000000000")
    done = bench(*VIRTUAL, *small, *SHORT_RUN, *axes, "-o", "run.json", fakes=["virtual_clock"])
    assert done.code == 0
    assert "decode kv=2000000000 is skipped: it needs about " in done.err
    fits, large = results.read(Path("run.json")).cases
    assert (fits.check.status, large.check.status, large.latency_ms) == ("ok", "not run", None)
    assert "; available are " in large.check.reason
    assert "decode kv=2000000000, mla: it needs about " in done.out
    plan = bench(*VIRTUAL, *small, *SHORT_RUN, *axes, "--dry-run")
    assert plan.code == 0
    assert re.search(r"^2 +decode kv=2000000000 .* does not fit, skipped$", plan.err, re.MULTILINE)
    assert "2 cases, about " in plan.err


def test_a_point_the_device_has_no_memory_for_after_all_does_not_cost_the_others(
    bench: Bench, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mla.bench.subjects import base

    expected_outputs = base.expected_outputs

    def refuse(config: Any, state: Any, inputs: Any, *rest: Any) -> Any:
        if inputs.scenario.history[0] == 3:
            raise MemoryError("no room\nfor 3")
        return expected_outputs(config, state, inputs, *rest)

    monkeypatch.setattr(base, "expected_outputs", refuse)
    done = bench(*VIRTUAL, *small, *SHORT_RUN, *GRID, "-o", "run.json", fakes=["virtual_clock"])
    assert done.code == 0
    cases = {case.point["kv"]: case for case in results.read(Path("run.json")).cases}
    assert [kv for kv, case in cases.items() if case.latency_ms is None] == [3]
    assert (cases[3].check.status, cases[3].check.reason) == ("not run", "no room")


def test_weights_and_oracle_of_one_scenario_are_gone_before_the_next(
    bench: Bench, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mla.bench.subjects import base

    tensors: list[Any] = []
    alive: list[int] = []
    expected_outputs = base.expected_outputs

    def watched(config: Any, state: Any, inputs: Any, *rest: Any) -> Any:
        alive.append(sum(tensor() is not None for tensor in tensors))
        outputs = expected_outputs(config, state, inputs, *rest)
        tensors.extend(map(weakref.ref, (outputs, inputs.hidden, *state.values())))
        return outputs

    monkeypatch.setattr(base, "expected_outputs", watched)
    bench(*VIRTUAL, *small, *SHORT_RUN, *GRID, fakes=["virtual_clock"])
    assert alive == [0] * 6
    assert tensors


def test_presets_are_shipped_workloads(bench: Bench, small: list[str]) -> None:
    points = {name: points_of(read_workload(name).scenarios, {}) for name in PRESETS}
    standard = [(point.name, point.query_lens, point.history) for point in points["standard"]]
    for name in ("smoke", "full"):
        assert [(point.name, point.query_lens, point.history) for point in points[name][:2]] == standard
        assert all(point.rounds >= 6 for point in points[name]), "an interval needs 6 passes"
    assert len(points["smoke"]) == 2
    assert {axis for point in points["full"] for axis in point.point} == {"kv", "batch", "q_len"}
    assert max(max(point.query_lens) for point in points["full"] if point.mode == "decode") > 1
    chosen = bench(*VIRTUAL, *small[:2], "--preset", "smoke", "--dry-run", fakes=["virtual_clock"])
    assert "scenario   decode: 16 requests, 16 new tokens per forward, history 50 to 400, 6 passes of 10" in (
        chosen.err
    )
