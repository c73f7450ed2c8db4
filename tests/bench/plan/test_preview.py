"""A dry run: every case with its memory and time, and nothing measured or written."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

Bench = Callable[..., Any]
CPU = ("--backend", "cpu", "--threads", "1", "--implementations", "mla")
VIRTUAL = ("--backend", "fake-virtual-clock")
FEW = ("--runs", "1", "--passes", "1", "--warmups", "0", "--scenario", "decode")


def test_a_dry_run_measures_and_writes_nothing(bench: Bench, small: list[str]) -> None:
    done = bench(*CPU, *small, "--dry-run", "-o", "run.json")
    assert (done.code, done.out) == (0, "")
    assert "scenario   decode: 2 requests, 2 new tokens per forward, history 5 to 9, " in done.err
    assert "plan       mla, interleaved; about 37 forwards, checked against a float64 oracle" in done.err
    assert not Path("run.json").exists()


def test_one_is_not_plural_and_one_history_no_range(bench: Bench, small: list[str]) -> None:
    axes = ("-a", "batch=1", "-a", "kv=7")
    done = bench(*CPU, *small, *FEW, *axes, "--dry-run")
    said = "1 request, 1 new token per forward, history 7, 1 pass of 1\n"
    assert f"scenario   decode batch=1 kv=7: {said}" in done.err


def test_a_dry_run_lists_every_case(bench: Bench, small: list[str]) -> None:
    both = ("--implementations", "mla,mla-reference")
    done = bench(*VIRTUAL, *small, *FEW, "-a", "kv=1..10+1", *both, "--dry-run", fakes=["virtual_clock"])
    assert (done.code, done.out) == (0, "")
    rows = re.findall(
        r"^\d+ +decode kv=(\d+) +(mla\S*) +2 +[\d.]+ GiB +[\d.]+ GiB +[\d.e-]+ s$", done.err, re.MULTILINE
    )
    assert rows == [(str(kv), name) for kv in range(1, 11) for name in ("mla", "mla-reference")]
    assert "scenario   decode: 10 points (--dry-run lists them)" in done.err
    assert re.search(r"20 cases, about [\d.e-]+ s, float64 oracle and checks included", done.err)
    assert "assumed efficiency: mla 50 %, mla-reference 20 %" in done.err
