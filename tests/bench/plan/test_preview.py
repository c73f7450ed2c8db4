"""A dry run: every case with its memory and time, and nothing measured or written."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mla.bench.measure.target import MAX_S
from mla.bench.plan import request as preview

Bench = Callable[..., Any]
CPU = ("--backend", "cpu", "--threads", "1", "--implementations", "mla")
VIRTUAL = ("--backend", "fake-virtual-clock")
SHORT_RUN = ("--runs", "1", "--passes", "1", "--warmups", "0", "--scenario", "decode")


def announced(said: str) -> float:
    """Return the seconds that a dry run says a run would take."""
    estimate = re.search(r"\d+ cases?, about ([\d.]+) (s|min|h) of forwards, plus ", said)
    assert estimate
    return float(estimate[1]) * {"s": 1, "min": 60, "h": 3600}[estimate[2]]


def test_a_dry_run_measures_and_writes_nothing(bench: Bench, small: list[str]) -> None:
    done = bench(*CPU, *small, "--dry-run", "-o", "run.json")
    assert (done.code, done.out) == (0, "")
    assert "scenario   decode: 2 requests, 2 new tokens per forward, history 5 to 9, " in done.err
    assert "plan       mla, interleaved; about 37 forwards, checked against a float64 oracle" in done.err
    assert not Path("run.json").exists()


def test_a_dry_run_lists_every_case(bench: Bench, small: list[str]) -> None:
    both = ("--implementations", "mla,mla-reference")
    done = bench(
        *VIRTUAL, *small, *SHORT_RUN, "-a", "kv=1..10+1", *both, "--dry-run", fakes=["virtual_clock"]
    )
    assert (done.code, done.out) == (0, "")
    rows = re.findall(
        r"^\d+ +decode kv=(\d+) +(mla\S*) +2 +[\d.]+ GiB +[\d.]+ GiB +[\d.e-]+ s$", done.err, re.MULTILINE
    )
    assert rows == [(str(kv), name) for kv in range(1, 11) for name in ("mla", "mla-reference")]
    assert re.search(r"20 cases, about [\d.e-]+ s of forwards, plus limits and float64 oracle\n", done.err)


def test_a_forward_of_each_case_is_run_and_counts(
    bench: Bench, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, ran = preview._forward, list[str]()

    def slow(fixture: Any, scenario: Any, name: str) -> float:
        ran.append(f"{scenario.name} {name}")
        assert 0 < forward(fixture, scenario, name) < 10
        return 1.0

    monkeypatch.setattr(preview, "_forward", slow)
    done = bench("--backend", "cpu", "--threads", "1", *small, "--dry-run")
    assert ran == ["prefill mla", "prefill mla-reference", "decode mla", "decode mla-reference"]
    assert len(re.findall(r" GiB +1 s$", done.err, re.MULTILINE)) == 4


def test_no_more_than_the_time_of_a_run_is_announced_unless_counts_are_given(
    bench: Bench, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preview, "_forward", lambda *_: 10.0)
    words = (*CPU, *small, "--scenario", "decode", "--dry-run")
    assert announced(bench(*words).err) <= MAX_S
    assert announced(bench(*words, "--passes", "50").err) > 2000


def test_what_is_not_tried_is_estimated_from_its_work(
    bench: Bench, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preview, "_forward", lambda *_: 1.0)
    now = iter(range(0, 10_000, 15))
    monkeypatch.setattr(preview.time, "monotonic", lambda: float(next(now)))
    done = bench(*CPU, *small, *SHORT_RUN, "-a", "batch=1,8", "-a", "kv=4", "--dry-run")
    assert re.search(r"^1 +decode batch=1 .* 1 s$", done.err, re.MULTILINE)
    estimate = re.search(r"^2 +decode batch=8 .* not tried, about ([\d.]+) s$", done.err, re.MULTILINE)
    assert estimate
    assert 1 < float(estimate[1]) <= 8
    assert announced(done.err) > 2


def test_a_forward_that_fails_is_told_and_the_others_are_tried(
    bench: Bench, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(fixture: Any, scenario: Any, name: str) -> float:
        if scenario.name == "prefill":
            raise RuntimeError("no such kernel")
        return 1.0

    monkeypatch.setattr(preview, "_forward", failing)
    done = bench(*CPU, *small, "--dry-run")
    assert done.code == 0
    assert "prefill, mla: one forward was tried and failed: " in done.err
    assert "no such kernel" in done.err
    assert re.search(r"^1 +prefill +mla .* failed$", done.err, re.MULTILINE)
    assert re.search(r"^2 +decode +mla .* 1 s$", done.err, re.MULTILINE)
